"""``asynclam box``: a sandbox like that of AWS Lambda. No other room imports anything of it."""
