"""What a grading writes: a page per student, results.json for Gradescope, JUnit XML, a table."""

import csv
import io
import json
import os
from pathlib import Path
from xml.etree import ElementTree

from data import UserError, printable
from lab.store import write_text

STATUS = {"passed": "passed", "failed": "failed", "not attempted": "failed", "marked": "passed"}
BY_HAND = "by hand"  # the status of what a teacher has not marked yet
COLUMNS = ["student", "test", "most", "points"]  # of by_hand.csv


def worth(tests):
    """What a point of each test is worth in the mark, which has 100.

    The points by hand of an assignment are points of the mark as they are; all tests share the rest
    of it by their points.
    """
    hand = [test["name"].startswith(BY_HAND) for test in tests]
    written = sum(test["points"] for test, by_hand in zip(tests, hand) if by_hand)
    others = sum(test["points"] for test in tests) - written
    return [1.0 if by_hand else (100 - written) / max(others, 1) for by_hand in hand]


def total(rows):
    """(points, most points), of 100."""
    shares = worth([row[1] for row in rows])
    points = sum(share * row[2] for share, row in zip(shares, rows))
    return round(points, 6), 100.0  # full marks are 100 and not 99.99999999999999


def titles(rows):
    """The names of the tests of some rows, each behind its file if there are several."""
    several = len({file["path"] for file, *_ in rows}) > 1
    return [
        f"{file['path']}, {test['name']}"
        if several and not test["name"].startswith(BY_HAND)
        else test["name"]
        for file, test, *_ in rows
    ]


def page(student, about, rows):
    """The result of one student as Markdown."""
    points, most = total(rows)
    lines = [f"# {about['title']}: {student}", "", f"**{points:.1f} of {most:.0f} points**", ""]
    shares = worth([row[1] for row in rows])
    waiting = [x * row[1]["points"] for x, row in zip(shares, rows) if row[3] == BY_HAND]
    if waiting:
        lines += [f"Up to {sum(waiting):.1f} more are marked by hand.", ""]
    if len(set(shares)) > 1:
        lines += [
            "Points by hand are points of the 100; the tests share the rest by their points.",
            "",
        ]
    for one in about["files"]:
        lines += [f"## {one['path']}", "", "| test | points | result |", "|---|---|---|"]
        for file, test, got, status, message in rows:
            if file is one:
                said = " ".join(f"{status}: {message}".split()) if message else status
                said = said.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
                lines.append(f"| {test['name']} | {got} of {test['points']} | {said} |")
        lines.append("")
    return "\n".join(lines)


def gradescope(rows, seconds):
    """The result as Gradescope's results.json; hidden tests are shown after the due date."""
    points, _ = total(rows)
    tests = [
        {
            "name": title,
            "score": got,
            "max_score": test["points"],
            **({"status": STATUS[status]} if status in STATUS else {}),
            "output": f"{status}: {message}" if message else status,
            "visibility": "visible" if test["visible"] else "after_published",
        }
        for title, (_, test, got, status, message) in zip(titles(rows), rows)
    ]
    return {"score": round(points, 2), "execution_time": round(seconds, 1), "tests": tests}


def junit(student, rows):
    """The result as JUnit XML."""
    passed = ("passed", "marked", BY_HAND)
    failed = sum(status not in passed for *_, status, _ in rows)
    suite = ElementTree.Element(
        "testsuite", name=clean(student), tests=str(len(rows)), failures=str(failed)
    )
    for file, test, _, status, message in rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname=file["module"], name=clean(test["name"])
        )
        if status == BY_HAND:
            ElementTree.SubElement(case, "skipped", message=clean(message))
        elif status not in passed:
            ElementTree.SubElement(case, "failure", type=status, message=clean(message))
    return ElementTree.tostring(suite, encoding="unicode")


def clean(text):
    """A text without the control characters that XML forbids."""
    return "".join(c if c in "\t\n" or c >= " " else "?" for c in text)


def write(folder, student, about, rows, seconds):
    """Write STUDENT.md, STUDENT.json and STUDENT.xml."""
    write_text(folder / f"{student}.md", page(student, about, rows))
    write_text(folder / f"{student}.json", json.dumps(gradescope(rows, seconds), indent=1))
    write_text(folder / f"{student}.xml", junit(student, rows))


def cell(student):
    """A name that no spreadsheet takes for a formula."""
    return f"'{student}" if student[:1] in "=+-@" else student


def write_class(folder, graded):
    """Write class.csv: one line per student, the points of every test beside the total."""
    lines = [["student", "points", *titles(next(iter(graded.values())))]]
    for student, rows in graded.items():
        points = ["" if row[3] == BY_HAND else row[2] for row in rows]
        lines.append([cell(student), f"{total(rows)[0]:.1f}", *points])
    write_csv(folder / "class.csv", lines)


def write_csv(path, lines):
    """Write the lines of a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(path, text.getvalue())


def read_csv(path, name):
    """The lines of a table, which a spreadsheet may have saved. UserError: it cannot be read."""
    try:
        if not path.is_file():  # a pipe would never end
            raise UserError(f"{name}: it cannot be read, since it is not a file")
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a mark
            return [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: it cannot be read as CSV in UTF-8") from error


# ---------------------------------------------------------------- what a teacher marks


def write_by_hand(folder, graded):
    """Write by_hand.csv, a line for all that a teacher has to mark -> the number of new lines.

    Lines that are there already stay as they are, since a teacher may have filled them in.
    """
    lines = [
        [cell(student), test["name"], test["points"], ""]
        for student, rows in graded.items()
        for _, test, _, status, _ in rows
        if status == BY_HAND
    ]
    path = folder / "by_hand.csv"
    known = read_csv(path, path) if os.path.lexists(path) else []
    there = [line[:2] for line in known]
    new = [line for line in lines if line[:2] not in there]
    if new:
        write_csv(path, [*(known or [COLUMNS]), *new])
    return len(new)


def read_by_hand(path):
    """{(student, test, most): points} of the filled lines of by_hand.csv. UserError: a mistake."""
    lines, marks = read_csv(Path(path), f"--written {path}"), {}
    if not lines or not set(COLUMNS) <= set(lines[0]):
        raise UserError(f"--written {path}: expected the columns {','.join(COLUMNS)}")
    for number, cells in enumerate(lines[1:], 2):
        line = dict.fromkeys(COLUMNS, "") | dict(zip(lines[0], cells))
        key = line["student"], line["test"]
        if line["points"]:
            try:
                points, most = float(line["points"]), float(line["most"])
            except ValueError:
                points, most = -1.0, 0.0
            if not 0 <= points <= most:
                raise UserError(
                    f"--written {path}, line {number}: points {printable(line['points'])} are not "
                    f"a number from 0 to {printable(line['most'])}"
                )
            key = *key, most
            if key in marks:
                raise UserError(
                    f"--written {path}, line {number}: {of_line(key)} has points already"
                )
            marks[key] = points
    return marks


def of_line(key):
    """The student and the test of a line of by_hand.csv, as a text."""
    return ", ".join(printable(part) for part in key[:2])


def unused(marks, graded):
    """What is said about the lines of --written that changed no mark, or ""."""
    used = {
        (cell(student), test["name"], test["points"])
        for student, rows in graded.items()
        for _, test, _, status, _ in rows
        if status == "marked"
    }
    left = [key for key in marks if key not in used]
    if not left:
        return ""
    more = f" (and of {len(left) - 1} more lines)" if left[1:] else ""
    return (
        f"not used: the points of `{of_line(left[0])}`{more} in --written, since no submission "
        f"here has such a test of {left[0][2]:g} points to mark by hand"
    )


def marked_by_hand(rows, student, marks):
    """The rows, with the points that a teacher gave where nothing else has marked them."""
    done = []
    for file, test, points, status, message in rows:
        key = cell(student), test["name"], test["points"]
        if status == BY_HAND and key in marks:
            points, status = marks[key], "marked"
        done.append((file, test, points, status, message))
    return done
