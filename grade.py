"""Grade a folder of submissions: one table for the class, one page per student.

    python grade.py hw3/grader submissions/ --out results/
    python grade.py hw3/grader submissions/ --out results/ --jobs 2 --user nobody
    python grade.py hw9/grader submissions/ --out results/ --written results/by_hand.csv

A submission is a folder with the listed files, or, if one file is asked for, a Python file. Each
runs in a process of its own with limits on time and memory. --out holds STUDENT.md, STUDENT.json
(Gradescope's results.json), STUDENT.xml (JUnit) and class.csv; by_hand.csv lists what a teacher has
to mark. The exit status is 0 when all submissions were graded, whatever their marks, and 2 when the
command itself cannot be carried out.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import UserError, error_line, printable


def parsed(arguments):
    parser = argparse.ArgumentParser(
        prog="grade.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("grader", help="the folder grader/ that assign.py wrote")
    parser.add_argument("submissions", help="a folder with a folder or a file per student")
    parser.add_argument("--out", default="results", help="folder to write (default: results)")
    parser.add_argument("--jobs", type=int, default=1, help="submissions at a time")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="limit for one call of a function"
    )
    parser.add_argument(
        "--written",
        metavar="FILE",
        help="the points of what is marked by hand: OUT/by_hand.csv, filled in",
    )
    parser.add_argument(
        "--user", help="run submissions as this user, who cannot read the grader (needs root)"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Carry out a command line -> its exit status."""
    given = parsed(arguments)
    import torch

    from classroom import grader, outputs

    torch.set_num_threads(1)
    try:
        folder = Path(given.grader)
        if not (folder / "assignment.json").is_file():
            raise UserError(f"{folder} has no assignment.json: name the grader/ of an assignment")
        if given.jobs < 1 or not 0 < given.seconds < float("inf"):
            raise UserError("--jobs and --seconds are positive numbers")
        about, sheets = grader.assignment(folder)
        found = grader.submissions(given.submissions, about)
        marks = outputs.read_by_hand(given.written) if given.written else {}
        out = Path(given.out)
        out.mkdir(parents=True, exist_ok=True)

        def one(student):
            rows, seconds = grader.grade(
                folder, about, sheets, found[student], given.seconds, given.user
            )
            rows = outputs.marked_by_hand(rows, student, marks)
            outputs.write(out, student, about, rows, seconds)
            return student, rows, seconds

        graded = {}
        with ThreadPoolExecutor(given.jobs) as pool:
            for student, rows, seconds in pool.map(one, found):
                graded[student] = rows
                points = outputs.total(rows)[0]
                print(f"{printable(student):<24} {points:5.1f} points {seconds:6.1f} s", flush=True)
        outputs.write_class(out, graded)
        if said := outputs.unused(marks, graded):
            print(said)
        if count := outputs.write_by_hand(out, graded):
            print(f"written: {count} lines of {out}/by_hand.csv; fill in the points for --written")
        print(f"written: {out}/class.csv, and a page per student")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"error: {where}{printable(error_line(error))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
