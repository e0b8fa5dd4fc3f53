"""Assignments, their tests and their grader, made out of any method file (docs/classroom.md).

assign.py writes an assignment and grade.py grades what comes back. Nothing here is needed to run a
method.
"""
