"""Make an assignment out of method files: a handout for students and a grader for the teacher.

    python assign.py methods/rdpo.py --blank loss --out hw3
    python assign.py methods/irpo.py methods/adpo.py --blank loss --blank targets --out hw6
    python assign.py 2 --out hw2 --seed 7       one of the ready-made assignments
    python assign.py --list                     what they are

OUT/student/ goes to the students, OUT/grader/ stays with you: `python grade.py OUT/grader FOLDER`
grades a folder of submissions. Nothing is written unless the hidden tests tell every single edit of
the blanked code from the solution.
"""

import argparse
import sys
import time
from pathlib import Path

from data import UserError, error_line, printable


def parsed(arguments):
    parser = argparse.ArgumentParser(
        prog="assign.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", help="method files, or the number of a ready-made one")
    parser.add_argument(
        "--blank",
        action="append",
        metavar="NAMES",
        help="functions to blank, loss,gap; loss:2 blanks the right side of its second '='; once "
        "for all files or once per file (default: loss)",
    )
    parser.add_argument(
        "--keep", choices=("comments",), help="leave the comments of the solution in the blank"
    )
    parser.add_argument("--out", default="assignment", help="folder to write (default: assignment)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another seed has other inputs, and another sheet of a ready-made assignment",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    parser.add_argument(
        "--gradescope", action="store_true", help="also write OUT/autograder.zip for Gradescope"
    )
    parser.add_argument("--list", action="store_true", help="print the ready-made assignments")
    return parser, parser.parse_args(arguments)


def write(given, out):
    """Write the assignment that a command line asks for. UserError: it cannot be written."""
    from classroom import handout, ready, tasks

    title, task, written, paths, texts = None, "", (), given.what, given.blank or ["loss"]
    if len(given.what) == 1 and given.what[0].isdecimal():
        number = int(given.what[0])
        if number not in ready.READY and number not in ready.TASKS:
            raise UserError(f"no ready-made assignment {number}; see --list")
        if given.blank:
            raise UserError("a ready-made assignment says itself what is blanked: leave --blank")
        if number in ready.TASKS:
            if given.keep:
                raise UserError(f"nothing is blanked in assignment {number}: leave --keep")
            return tasks.write(ready.TASKS[number], out, given.seed)
        title, option, task = ready.chosen(number, given.seed)
        written = ready.by_hand(ready.READY[number].written)
        paths = [handout.ROOT / ready.path_of(name) for name, _ in option]
        texts = [text for _, text in option]
    if len(texts) == 1:
        texts = texts * len(paths)
    if len(texts) != len(paths):
        raise UserError(f"{len(texts)} times --blank for {len(paths)} files")
    files = handout.files_of(paths, texts)
    kept = bool(given.keep)
    return handout.write(files, out, given.seed, kept, title, task, written=written)


def main(arguments=None):
    """Carry out a command line -> its exit status."""
    parser, given = parsed(arguments)
    from classroom import package, ready

    if given.list:
        print(ready.listing())
        return 0
    try:
        if not given.what:
            raise UserError("name a method file, such as methods/rdpo.py, or see --list")
        out = Path(given.out)
        if out.exists() and not given.overwrite:
            raise UserError(f"{out} exists: choose another --out, or add --overwrite")
        if given.overwrite and out.exists() and not (out / "grader/assignment.json").is_file():
            raise UserError(f"{out} is no assignment, so it is not replaced")
        start = time.monotonic()
        write(given, out)
        if given.gradescope:
            print(f"written: {package.write(out)}")
        print(f"written: {out}/student and {out}/grader, in {time.monotonic() - start:.0f} s")
        print(f"next: python grade.py {out}/grader FOLDER")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"error: {where}{printable(error_line(error))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
