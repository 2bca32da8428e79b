"""The same program with a Process and a Pipe, in a thread that blocks."""

import asyncio
from multiprocessing import get_context
from multiprocessing.connection import Connection


def job(number: int) -> int:
    return number * number


def child(connection: Connection, number: int) -> None:
    connection.send(job(number))


def run(number: int) -> int:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, number))
    process.start()
    result: int = ours.recv()
    process.join()
    return result


async def main() -> None:
    print(await asyncio.to_thread(run, 12), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
