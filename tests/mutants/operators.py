"""One-line changes of a module's formulas and guards: signs, comparisons, numbers, conditions and calls left out.

Messages, annotations, docstrings, assertions and logging are left alone: no test has to know their words.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARE = {
    ast.Lt: ("<", (">=", "<=")),
    ast.LtE: ("<=", (">", "<")),
    ast.Gt: (">", ("<=", ">=")),
    ast.GtE: (">=", ("<", ">")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
}
_BINARY = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "ceil": "floor", "floor": "ceil"}
_NAMES |= {"all": "any", "any": "all", "cos": "sin", "log": "exp", "clamp": "nan_to_num"}
_SILENT = ("logger", "warnings")


@dataclass(frozen=True)
class Mutant:
    """A change of some bytes of a file."""

    file: str
    """Of the project, such as aldm/pace.py."""
    line: int
    """1 is the first."""
    before: str
    """The line that is changed, stripped; the first of a statement that runs over several."""
    after: str
    """What stands there then."""
    source: str
    """The whole changed file."""

    @property
    def change(self) -> str:
        """The change in words; it stays the same when lines above it are added."""
        return f"{self.before}  ->  {self.after}"


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Return the one-line changes of a file, from its first line to its last, none twice."""
    found: dict[str, Mutant] = {}
    for start, end, text in _Visitor(source).edits(ast.parse(source)):
        mutant = replaced(file, source, start, end, text)
        found.setdefault(mutant.source, mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.after))


def replaced(file: str, source: str, start: int, end: int, text: str) -> Mutant:
    """Return the mutant with characters start to end of a file replaced."""
    changed = source[:start] + text + source[end:]
    begin = source.rfind("\n", 0, start) + 1
    before = source[begin : source.find("\n", start)].strip()
    after = changed[begin : changed.find("\n", start + len(text))].strip()
    line = source.count("\n", 0, start) + 1
    return Mutant(file, line, before, " ".join(after.split()), changed)


def span_of(tree: ast.Module, line: int) -> tuple[int, int]:
    """Return the lines of the innermost statement that holds a line; of a block those before its body."""
    span, block = (line, line), tree.body
    while inner := next((one for one in block if one.lineno <= line <= (one.end_lineno or 0)), None):
        block = [child for child in ast.walk(inner) if isinstance(child, ast.stmt) and child is not inner]
        head = min((child.lineno for child in block), default=(inner.end_lineno or 0) + 1) - 1
        if line <= max(head, inner.lineno):
            return inner.lineno, max(head, inner.lineno)
        span = (inner.lineno, inner.lineno)
    return span


Edit = tuple[int, int, str]


class _Visitor:
    """Walks a tree and names the edits: (start, end, text), in characters of the source."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines = [line.encode() for line in source.splitlines(keepends=True)]
        starts = [0]
        for line in self._lines:
            starts.append(starts[-1] + len(line.decode()))
        self._starts = starts

    def edits(self, node: ast.AST) -> Iterator[Edit]:
        """Yield the edits of a node and of all below it."""
        if _is_left_alone(node):
            return
        yield from self._own(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.edits(child)

    def _own(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                token, others = _COMPARE[type(op)]
                yield from self._operator(left, right, token, others)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY and not _is_text(left, right):
                token, other = _BINARY[type(op)]
                yield from self._operator(left, right, token, (other,))
            case ast.BoolOp(op=op, values=values):
                token, other = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                yield from self._operator(values[-2], values[-1], token, (other,))
            case ast.AugAssign(target=target, op=ast.Add() | ast.Sub() as op, value=value):
                token, other = ("+=", "-=") if isinstance(op, ast.Add) else ("-=", "+=")
                yield from self._operator(target, value, token, (other,))
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield (*self._span(node), f"({self._text(operand)})")
            case ast.Constant(value=bool() as value):
                yield (*self._span(node), str(not value))
            case ast.Constant(value=int() | float() as value):
                yield (*self._span(node), _other_number(value))
            case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
                yield (*self._span(test), f"not ({self._text(test)})")
            case ast.If(test=test) if _is_guard(node):
                yield (*self._span(test), "False")
            case ast.Expr(value=ast.Call()):
                yield (*self._span(node), "pass")
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _NAMES:
                end = self._offset(node.func.end_lineno, node.func.end_col_offset)
                yield end - len(name), end, _NAMES[name]

    def _operator(self, left: ast.AST, right: ast.AST, token: str, others: tuple[str, ...]) -> Iterator[Edit]:
        begin, end = self._span(left)[1], self._span(right)[0]
        place = self._source.find(token, begin, end)
        assert place >= 0, (token, self._source[begin:end])
        for other in others:
            yield place, place + len(token), other

    def _offset(self, line: int | None, column: int | None) -> int:
        assert line is not None
        return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt)
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._source[start:end]


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).partition(".")[0] in _SILENT


def _is_text(*nodes: ast.AST) -> bool:
    return any(isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str) for node in nodes)


def _is_guard(node: ast.If) -> bool:
    return isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue | ast.Break) and not node.orelse


def _other_number(value: int | float) -> str:
    if isinstance(value, int):
        return str(value + 1)
    return repr(value * 1.25 if value else 1.0)
