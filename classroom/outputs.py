"""What a grading writes: a page per student, results.json for Gradescope, JUnit XML, a table."""

import csv
import json
from xml.etree import ElementTree

STATUS = {"passed": "passed", "failed": "failed", "not attempted": "failed"}


def total(rows):
    """(points, most points), of 100."""
    most = sum(row[1]["points"] for row in rows)
    return 100.0 * sum(row[2] for row in rows) / max(most, 1), 100.0


def page(student, about, rows):
    """The result of one student as Markdown."""
    points, most = total(rows)
    lines = [f"# {about['title']}: {student}", "", f"**{points:.1f} of {most:.0f} points**", ""]
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
            "name": test["name"],
            "score": got,
            "max_score": test["points"],
            "status": STATUS[status],
            "output": f"{status}: {message}" if message else status,
            "visibility": "visible" if test["visible"] else "after_published",
        }
        for _, test, got, status, message in rows
    ]
    return {"score": round(points, 2), "execution_time": round(seconds, 1), "tests": tests}


def junit(student, rows):
    """The result as JUnit XML."""
    failed = sum(status != "passed" for *_, status, _ in rows)
    suite = ElementTree.Element(
        "testsuite", name=clean(student), tests=str(len(rows)), failures=str(failed)
    )
    for file, test, _, status, message in rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname=file["module"], name=clean(test["name"])
        )
        if status != "passed":
            ElementTree.SubElement(case, "failure", type=status, message=clean(message))
    return ElementTree.tostring(suite, encoding="unicode")


def clean(text):
    """A text without the control characters that XML forbids."""
    return "".join(c if c in "\t\n" or c >= " " else "?" for c in text)


def write(folder, student, about, rows, seconds):
    """Write STUDENT.md, STUDENT.json and STUDENT.xml."""
    (folder / f"{student}.md").write_text(page(student, about, rows), encoding="utf-8")
    text = json.dumps(gradescope(rows, seconds), indent=1)
    (folder / f"{student}.json").write_text(text, encoding="utf-8")
    (folder / f"{student}.xml").write_text(junit(student, rows), encoding="utf-8")


def write_class(folder, graded):
    """Write class.csv: one line per student, the points of every test beside the total."""
    names = [test["name"] for _, test, *_ in next(iter(graded.values()))]
    with open(folder / "class.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "points", *names])
        for student, rows in graded.items():
            name = f"'{student}" if student[:1] in "=+-@" else student  # no formula in a sheet
            writer.writerow([name, f"{total(rows)[0]:.1f}", *(row[2] for row in rows)])
