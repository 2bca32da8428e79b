"""``asyncio.gather`` over all three kinds of work: a worker, a thread, and the loop itself."""

import asyncio
import hashlib
import os

from asynclam import run_blocking, run_cpu


def stretch(password, rounds):
    return hashlib.pbkdf2_hmac("sha256", password, b"salt", rounds).hex()


async def version():
    process = await asyncio.create_subprocess_exec("uname", "-r", stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode().strip()


async def main():
    key, names, kernel = await asyncio.gather(
        run_cpu(stretch, b"secret", 200_000),  # CPU: a worker process
        run_blocking(os.listdir, "/"),  # blocking IO: a thread
        version(),  # async IO: the loop
    )
    print(key[:16], len(names), kernel)


if __name__ == "__main__":
    asyncio.run(main())
