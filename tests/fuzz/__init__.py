"""Fuzzing of all that parses bytes of another process: ``make fuzz`` (atheris), and a little in the suite.

    make fuzz ARGS="--seconds 600 --target decoder"

The targets take bytes and raise nothing, unless something is wrong. What atheris finds is written to
``.fuzz``, with the corpus that it has built up, and told with the command that repeats it.
"""
