"""The smallest Lambda function: one job in a worker, the loop free meanwhile."""

from asynclam import lambda_handler, run_cpu


def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


@lambda_handler
async def handler(event, context):
    return {"result": await run_cpu(fibonacci, event["n"])}


handler.start()  # at init, where Lambda does not throttle the CPU
