"""Finds comments and docstrings whose first sentence opens with a word that leaves its noun to be guessed.

A comment's first sentence has a subject and a verb, or is an imperative: `Sizes of maps are ...`, `Check that ...`, not
`The same for ...`, `Of the layers that ...`, `Whether ...`. Only a comment at the end of a line of code may open with `of`,
because its noun stands before it: `int rows;  // of a block`. Takes files; prints what it found and exits with 1.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

COMMENT_SIGNS = ("#", "//", '"""')
OPENERS = re.compile(r"(the same|of|those|what|whether|where|from|about|as)\b", re.IGNORECASE)


def python_comments(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, and line and first line of each comment."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield node.body[0].lineno, docstring
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    yield from blocks([(token.start, token.string.lstrip("#!")) for token in comments])


def cpp_comments(text: str) -> Iterator[tuple[int, str]]:
    """Line and first line of each comment of C++ or CUDA."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        comment = re.search(r'(?<!["\w:])//(?!/)', line)
        if comment and line[: comment.start()].count('"') % 2 == 0:
            found.append(((number, comment.start()), line[comment.end() :]))
    yield from blocks(found)


def blocks(comments: list[tuple[tuple[int, int], str]]) -> Iterator[tuple[int, str]]:
    """The first lines of comments: lines that follow each other in the same column are one comment."""
    previous = (0, 0)
    for place, text in comments:
        if place != (previous[0] + 1, previous[1]):
            yield place[0], text
        previous = place


def main(paths: list[str]) -> int:
    count = 0
    for path in paths:
        read, content = python_comments if path.endswith(".py") else cpp_comments, Path(path).read_text()
        lines = content.splitlines()
        for line, text in read(content):
            follows_code = not lines[line - 1].strip().startswith(COMMENT_SIGNS)
            if OPENERS.match(text.strip()) and not (follows_code and text.strip().startswith("of ")):
                print(f"{path}:{line}: {text.strip().splitlines()[0]}")
                count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
