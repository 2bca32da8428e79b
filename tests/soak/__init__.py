"""The soak: a great many jobs of all kinds among deaths, stops, cancels and shortages.

    make soak                                   # 1,000,000 jobs, and docs/soak.md
    make soak ARGS="--jobs 20000 --seed 7"
    make soak ARGS="--seconds 60"

Rounds, one after the other, each in a process of its own with settings of its own (event loop, how
the fork server is started, how large payloads travel, how many workers, what is disturbed). A round
uses some executors in turn, gives them jobs, and disturbs them meanwhile. It holds every job to its
one outcome, with a ledger in the loop process and a page in which each job marks that it begins; and
itself to leaving nothing behind.
"""
