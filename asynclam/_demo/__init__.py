"""``python -m asynclam demo``: a Lambda function on real input, with a real S3 server beside it."""
