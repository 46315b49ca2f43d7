"""The study of docs/study.md: `plan` says what is run, `python -m benchmarks.study.run` runs it.

plan      tasks, methods and cells; which learning rates are searched
data      the data sets as prompts and responses, written beside the runs
metrics   when an answer is right
scoring   losses under four kinds of routing, answers, weights
cell      one cell, in a process of its own: `remix train`, then scoring
run       the runner, which goes on where it was stopped
rows      the table of finished cells
tables    the sections of docs/study.md, from the rows
"""
