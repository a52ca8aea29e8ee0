"""Tables and pictures of results that were measured earlier.

python benchmarks/report.py results.json                                    the tables
python benchmarks/report.py results.json --csv rows.csv --plot picture.png
python benchmarks/report.py --write benchmarks/results/*/*.json             the tables as files beside them
python benchmarks/report.py --readme                                        the chart and the table of README.md
"""

import json
from pathlib import Path

from bench import options, readme, results


def parse_arguments(arguments=None):
    parser = options.new_parser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSON files of benchmarks")
    parser.add_argument("--write", action="store_true", help="write FILE.md beside each and print nothing")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="the rows of the one file")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="the picture of the one file: memory, scaling, speed")
    parser.add_argument("--readme", action="store_true", help="draw the chart of README.md and print its table")
    args = parser.parse_args(arguments)
    if bool(args.files) == args.readme:
        parser.error("report.py takes files of results, or --readme")
    if (args.csv or args.plot) and len(args.files) > 1:
        parser.error("--csv and --plot take one file of results")
    return args


def main():
    args = parse_arguments()
    if args.readme:
        readme.draw(readme.CHART)
        print(readme.table(), end="")
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
