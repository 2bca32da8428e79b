"""Makes the zip of a Lambda function, so that it starts fast: installs, trims, compiles, packs.

    python3.13 package.py --output function.zip ../hello.py ../s3_to_s3.py

Run it with the Python version of the function's runtime, on its architecture: wheels and .pyc files
are made for that. What it does to what pip has installed, and why:

* of botocore's descriptions of 400 services it keeps those of S3 and STS (27 MB less to unpack);
* of the certificate authorities that botocore trusts it keeps Amazon's own, which sign all endpoints
  of AWS: the file is parsed by every client that is made. Leave that out (--all-authorities) if
  your function talks through botocore to endpoints that others have signed;
* it leaves out what no function imports: tests, C and Cython sources, stubs, asynclam's tools;
* it compiles everything, for Lambda cannot write .pyc files beside the code, and would compile at
  every cold start. The .pyc files are valid whatever the time stamps of the sources say.

It needs nothing but Python with pip. The same input makes the same zip, byte by byte.
"""

import argparse
import compileall
import py_compile
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {"s3", "sts"}
AUTHORITIES = ("Amazon Root CA", "Starfield Services Root", "Starfield Class 2")
UNUSED = (
    "**/__pycache__", "**/tests", "**/*.c", "**/*.h", "**/*.pxd", "**/*.pyi", "**/*.pyx", "bin",
    "asynclam/_box", "asynclam/_demo", "uvloop/_testbase.py", "uvloop/handles", "uvloop/includes/*.pxd",
)  # fmt: skip
LIMIT = 250 << 20  # bytes, unzipped: Lambda's own


def main():
    options = parse()
    directory = options.directory or options.output.with_suffix("")
    shutil.rmtree(directory, ignore_errors=True)
    install(options.requirement, directory)
    trim(directory, all_authorities=options.all_authorities)
    for source in options.sources:
        shutil.copy(source, directory)
    compile_all(directory)
    report(directory)
    if options.output:
        pack(directory, options.output)
        size = options.output.stat().st_size
        own, compiled = (own_code_in(options.output, suffix) for suffix in (".py", ".pyc"))
        print(f"{options.output}: {size:,} bytes; asynclam: {own:,}, and {compiled:,} compiled")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, help="your own modules")
    parser.add_argument("--output", type=Path, help="the zip to make")
    parser.add_argument("--directory", type=Path, help="where to lay it out (default: beside it)")
    parser.add_argument("--requirement", action="append", help="what to install")
    parser.add_argument("--all-authorities", action="store_true", help="keep botocore's file")
    options = parser.parse_args()
    if not (options.output or options.directory):
        parser.error("give --output, --directory, or both")
    options.requirement = options.requirement or [f"{ROOT}[s3]"]
    return options


def install(requirements, directory):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
    subprocess.run(
        [
            *pip,
            "--disable-pip-version-check",
            "--no-compile",
            "--target",
            str(directory),
            *requirements,
        ],
        check=True,
    )


def trim(directory, *, all_authorities):
    for pattern in UNUSED:
        for path in list(directory.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    botocore = directory / "botocore"
    if botocore.exists():
        for service in (botocore / "data").iterdir():
            if service.is_dir() and service.name not in SERVICES:
                shutil.rmtree(service)
        if not all_authorities:
            keep_authorities(botocore / "cacert.pem")


def keep_authorities(file):
    text = file.read_text(encoding="utf-8")
    certificates = re.findall(
        r'# Label: "([^"]*)".*?(-----BEGIN.*?-----END CERTIFICATE-----\n)', text, re.DOTALL
    )
    kept = [(label, pem) for label, pem in certificates if label.startswith(AUTHORITIES)]
    if len(kept) < len(AUTHORITIES):
        sys.exit(f"{file} is not written as it was: look what has become of Amazon's authorities")
    file.write_text("".join(f"# {label}\n{pem}" for label, pem in kept), encoding="utf-8")


def compile_all(directory):
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    # Paths as they are in Lambda: they are what tracebacks show.
    compileall.compile_dir(
        directory, quiet=2, stripdir=directory, prependdir="/var/task", invalidation_mode=mode
    )


def report(directory):
    sizes = {}
    for path in files_in(directory):
        top = path.relative_to(directory).parts[0]
        sizes[top] = sizes.get(top, 0) + path.stat().st_size
    for top, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        print(f"{size:>12,} {top}")
    total = sum(sizes.values())
    print(f"{total:>12,} bytes unzipped, {total / LIMIT:.0%} of what a function may have")


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def pack(directory, output):
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files_in(directory):
            info = zipfile.ZipInfo(str(path.relative_to(directory)))  # dated 1980, always
            info.external_attr = (path.stat().st_mode & 0o755 | 0o444) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, path.read_bytes())


def own_code_in(output, suffix):
    with zipfile.ZipFile(output) as archive:
        return sum(
            info.compress_size
            for info in archive.infolist()
            if info.filename.startswith("asynclam/") and info.filename.endswith(suffix)
        )


if __name__ == "__main__":
    main()
