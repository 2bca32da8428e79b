"""Measures asynclam beside its peers, in one run: ``python -m benchmarks``.

Each block of measurements is a fresh process (``block``), and the blocks of a row take turns
(``run``), so that the noise of the machine hits all contestants alike. What is compared is divided
within a block where both sides can be in one process, else within a round of blocks.
"""
