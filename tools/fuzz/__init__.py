"""Damaged inputs for every parser of outside files, and for what users pass to the library.

    python -m tools.fuzz --inputs 100000 --seed 0        # all parsers, some minutes on two cores
    python -m tools.fuzz --inputs 5000 --parser draft    # one of them
    python -m tools.fuzz --replay FINDING                # a finding again, with its traceback

Each input is a good example with a file of it damaged, or an odd call. It shall be read, or be
refused by one line that names what is wrong; all else is a finding: another exception, a message
that a terminal should not get, more than `limits.SECONDS` of processor time, more than
`limits.MOST_BYTES` of memory, the end of the process. Inputs follow from the seed, the parser's
name and a number alone, so a finding comes again as long as the mutations stay what they are; what
it was made of is kept beside it for the time after.
"""
