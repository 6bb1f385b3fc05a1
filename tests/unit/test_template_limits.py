"""Exploding templates and deeply nested files are rejected in time and memory linear to their length."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.api.loading import named_repository
from orchestrator.config.source.document import read_document
from orchestrator.config.source.problems import Problems, TooManyProblems
from orchestrator.config.workflows.templates import compile_template
from orchestrator.engine.phases.prompts import PromptVariables, is_condition_met, render
from orchestrator.errors import RefusedError

N = 10**9
DOUBLING = "{% set ns = namespace(a='x' * 1000) %}{% for i in range(60) %}{% set ns.a = ns.a OP ns.a %}{% endfor %}"
GREEDY = [
    f"{{{{ 'x' * {N} }}}}",
    f"{{{{ {N} * 'x' }}}}",
    f"{{{{ ['x'] * {N} }}}}",
    f"{{% if ('x' * {N}) %}}{{% endif %}}",
    f"{{% set a = 'x' * {N} %}}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 2 ** (2 ** 40) }}",
    f"{{{{ '%{N}d' % 1 }}}}",
    f"{{{{ '%{N}d' | format(1) }}}}",
    f"{{{{ '{{:{N}}}'.format(1) }}}}",
    f"{{{{ '{{a:{N}}}'.format_map({{'a': 1}}) }}}}",
    f"{{{{ 'x' | center({N}) }}}}",
    f"{{{{ 'x'.center({N}) }}}}",
    f"{{{{ 'x'.ljust({N}) }}}}",
    f"{{{{ 'x'.rjust({N}) }}}}",
    f"{{{{ 'x'.zfill({N}) }}}}",
    f"{{{{ '\\t'.expandtabs({N}) }}}}",
    f"{{{{ (1).to_bytes({N}) }}}}",
    f"{{{{ 'x\\nx' | indent({N}) }}}}",
    f"{{{{ [1] | batch({N}, 'x') | list }}}}",
    f"{{{{ [1] | slice({N}) | list }}}}",
    f"{{{{ [1] | tojson(indent={N}) }}}}",
    f"{{{{ lipsum({N}) }}}}",
    f"{{{{ range({N}) | list }}}}",
    "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "{{ range(99999) | join('y' * 100000) }}",
    "{{ ('y' * 100000).join(('x' * 100000) | list) }}",
    "{{ ('x\\n' * 100000) | indent('y' * 10000) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    DOUBLING.replace("OP", "~"),
    DOUBLING.replace("OP", "+"),
    "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c }}",
    "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c | tojson }}",
    "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c | string }}",
    "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ 'x' ~ c }}",
    "{% set a = [[1] * 1000] * 1000 %}{{ a | sum(start=[]) | length }}",
    "{{ range(99999) | map('center', 100000) | join | length }}",
]


def facts() -> PromptVariables:
    """Return minimal facts."""
    return PromptVariables(task="a", prompt="Fix it.", marker="m")


@pytest.mark.extended_variants
@pytest.mark.parametrize("text", GREEDY)
def test_multiplying_template_is_rejected_within_limits(text: str) -> None:
    """Reading and rendering take a moment and a few megabytes."""
    start = time.process_time()
    tracemalloc.start()
    try:
        try:
            compile_template(text)
        except ValueError:
            return
        with pytest.raises(RefusedError):
            render(text, facts())
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 8


def test_multiplying_condition_is_rejected_within_limits() -> None:
    with pytest.raises(RefusedError, match="can't be evaluated"):
        is_condition_met("build", f"'x' * {N}", {})
    assert is_condition_met("build", "'x' * 3 == 'xxx' and 'a' ~ 'b' == 'ab'", {})


def test_useful_template_is_rendered() -> None:
    """Loops, joins, filters and sums of an ordinary size."""
    text = (
        "{% for a in range(300) %}{{ a ~ '-' ~ loop.index }}{{ ',' if not loop.last }}{% endfor %}\n"
        "{{ ['a', 'b'] | join(', ') | upper | indent(2) }} {{ 'a b' | replace(' ', '-') | center(9) }} "
        "{{ [1, 2] | sum }} {{ {'a': [1]} | tojson(indent=1) }} {{ 2 ** 10 * 3 + 7 % 4 }} {{ [3, 1] | sort | first }}"
    )
    made = render(text, facts())[0]
    assert "299-300" in made
    assert made.rstrip().endswith('A, B    a-b    3 {\n "a": [\n  1\n ]\n} 3075 1')


LENGTH = 60_000
DEEP = {
    "sequences": "[" * LENGTH,
    "sequences on lines": "[\n" * (LENGTH // 2),
    "mappings": "{a: " * (LENGTH // 4),
    "mappings on lines": "{a:\n " * (LENGTH // 6),
    "both": "[{a: " * (LENGTH // 5),
    "closed": "[" * (LENGTH // 2) + "]" * (LENGTH // 2),
    "many": ("[" * 50 + "]" * 50 + ",") * (LENGTH // 101),
    "blocks": "\n" + "- " * (LENGTH // 2),
    "questions": "[" + "? " * (LENGTH // 2),
    "one long word": "x" * LENGTH,
    "one long text": '"' + "\\x41" * (LENGTH // 4) + '"',
    "duplicates": "1\n" + "a: 1\n" * (LENGTH // 5),
    "tags": "[" + "!!str x, " * (LENGTH // 9) + "]",
    "anchors": "[" + "&a x, " * (LENGTH // 6) + "]",
    "aliases": "[" + "*a, " * (LENGTH // 4) + "]",
    "commas": "[" + "," * LENGTH + "]",
}


@pytest.mark.parametrize("what", DEEP)
def test_nested_file_is_as_fast_as_a_flat_one(tmp_path: Path, what: str) -> None:
    """Compared by CPU time of this process."""
    flat, deep = tmp_path / "flat.yaml", tmp_path / "deep.yaml"
    flat.write_text("a:\n" + "  - k\n" * (LENGTH // 6))
    deep.write_text(f"a: {DEEP[what]}\n")

    def cost(path: Path) -> float:
        start = time.process_time()
        named_repository(path)
        with suppress(TooManyProblems):
            read_document(path.read_text(), Problems("council.yaml"))
        return time.process_time() - start

    assert min(cost(deep) for _ in range(2)) < 15 * max(cost(flat), 0.01)
