"""Tables and pictures of results that were measured earlier.

python benchmarks/report.py results.json                                    the tables
python benchmarks/report.py results.json --csv rows.csv --plot picture.png
python benchmarks/report.py --write benchmarks/results/*/*.json             the tables as files beside them
"""

import json
from pathlib import Path

from bench import options, results


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON files of benchmarks")
    parser.add_argument("--write", action="store_true", help="write FILE.md beside each and print nothing")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="the rows of the one file")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="the picture of the one file: memory, scaling, speed")
    args = parser.parse_args(arguments)
    if (args.csv or args.plot) and len(args.files) > 1:
        parser.error("--csv and --plot take one file of results")
    return args


def main():
    args = parse_arguments()
    for path in args.files:
        found = json.loads(path.read_text())
        if args.write:
            path.with_suffix(".md").write_text(results.markdown(found))
        else:
            print(results.markdown(found))
        args.json = None
        results.write(args, found)


if __name__ == "__main__":
    main()
