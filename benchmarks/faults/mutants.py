"""Mutants of a source file: the same code with one small fault each, made by Cosmic Ray.

Of Cosmic Ray's operators those are used that a slip of the pen could be; two more remove a statement and a result.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword, Name

# Cosmic Ray replaces each operator by every other; most of these are killed by any test at all.
_PAIRS = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul FloorDiv_Div Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr BitXor_BitAnd "
    "RShift_LShift LShift_RShift"
)
_COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
_OTHERS = (
    "ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Invert "
    "ReplaceUnaryOperator_Delete_Not AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr "
    "ReplaceOrWithAnd ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer NumberReplacer "
    "RemoveDecorator ZeroIterationForLoop"
)


@dataclass(frozen=True)
class Mutant:
    """A file with one fault.

    first, last : lines of the file that were changed, counted from 1
    was, becomes : the changed lines without the space around them
    """

    first: int
    last: int
    was: str
    becomes: str
    source: str

    @property
    def key(self) -> tuple[str, str]:
        """What the fault is, wherever it stands in the file and however it is spaced."""
        return unspaced(self.was), unspaced(self.becomes)


def unspaced(code: str) -> str:
    """Code without its white space."""
    return "".join(code.split())


class RemoveStatement(Operator):
    """An assignment, a call or a raise that is not done."""

    _KINDS = frozenset({"expr_stmt", "atom_expr", "raise_stmt", "assert_stmt", "del_stmt", "yield_expr"})

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt" and node.children[0].type in self._KINDS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0]
        node.children[0] = Keyword("pass", first.start_pos, prefix=first.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class ReturnNothing(Operator):
    """A result that is not returned."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "return_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1] = Name("None", node.children[1].start_pos, prefix=" ")
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def _operators() -> list[Operator]:
    names = [f"ReplaceBinaryOperator_{pair}" for pair in _PAIRS.split()]
    names += [f"ReplaceComparisonOperator_{pair}" for pair in _COMPARISONS.split()]
    named = [get_operator(f"core/{name}")() for name in (*names, *_OTHERS.split())]
    return [*named, RemoveStatement(), ReturnNothing()]


class _Unannotated(ast.NodeTransformer):
    """Code without what is never computed: annotations and docstrings."""

    def visit(self, node: ast.AST) -> ast.AST:
        for part in ("annotation", "returns"):
            if getattr(node, part, None) is not None:
                setattr(node, part, ast.Constant(None))
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
        return self.generic_visit(node)


def _meaning(source: str) -> str:
    return ast.dump(_Unannotated().visit(ast.parse(source)))


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines; none that only changes an annotation, and none twice."""
    source, mutants = path.read_text(), list[Mutant]()
    parts = [child.get_code() for child in get_ast(source).children]
    for i, part in enumerate(parts):  # of a function or a class alone, because each mutant parses its part anew
        before, after = "".join(parts[:i]), "".join(parts[i + 1 :])
        for mutated in _changed(part):
            mutants.append(_mutant(source.splitlines(), before + mutated + after))
    return sorted(mutants, key=lambda one: (one.first, one.becomes))


def _changed(source: str) -> Iterator[str]:
    """A part of a file with each of the faults, once."""
    tree = get_ast(source)
    seen = {_meaning(source)}
    for operator in _operators():
        n = sum(1 for node in ast_nodes(tree) for _ in operator.mutation_positions(node))
        for occurrence in range(n):
            mutated = mutate_code(source, operator, occurrence)
            try:
                meaning = _meaning(mutated)
            except SyntaxError:
                continue
            if meaning not in seen:
                seen.add(meaning)
                yield mutated


def _mutant(before: list[str], mutated: str) -> Mutant:
    after = mutated.splitlines()
    shortest = min(len(before), len(after))
    first = next(i for i in range(shortest) if before[i] != after[i])
    same = next(i for i in range(shortest) if before[-1 - i] != after[-1 - i])
    same = min(same, shortest - first - 1)
    was, becomes = (" ".join(map(str.strip, lines[first : len(lines) - same])) for lines in (before, after))
    return Mutant(first + 1, len(before) - same, was, becomes, mutated)
