"""Templates of attackers, by hand and by chance: text or one line of refusal, quickly, in little
memory, nothing executed.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
from dialogues import LLAMA2, LLAMA3
from matrix import rounds
from test_sandbox import HOSTILE, ORDINARY
from transformers.utils.chat_template_utils import render_jinja_template

from llama_jax.errors import InputError
from llama_jax.text.formats import FORMATS
from llama_jax.text.sandbox import LARGEST_OUTPUT, render

DOUBLED = "{% set x = ('a', 'a') %}" + "{% set x = (x, x) %}" * 40
LAZY = "{% set g = g|map('title') %}" * 400 + "{{ g|list|length }}"
PATH = "'0.' * 200000 ~ '0'"
DEEP = (
    "{% set ns = namespace(g=('a',)) %}{% for i in range(20000) %}{% set ns.g = GROWN %}{% "
    "endfor %}"
)

# Ways out: Python's internals by attribute, by filter, by formatting, by the engine's own objects.
ESCAPES = {
    "subclasses": "{% for c in [].__class__.__base__.__subclasses__() %}{% if 'warning' in "
    "c.__name__ "
    "%}"
    "{{ c()._module.__builtins__['__import__']('os').popen('touch /tmp/x').read() }}{% "
    "endif %}{% endfor %}",
    "base": "{{ ().__class__.__bases__[0].__subclasses__()[40]('/etc/passwd').read() }}",
    "by key": "{{ ''['__class__']['__mro__'] }}{{ ''['__class__'].mro() }}",
    "by spelled key": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f']['\\x5f\\x5fmro\\x5f\\x5f'][1] }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attr by map": "{{ ['']|map('attr', '__class__')|list }}",
    "attribute by map": "{{ (['']|map(attribute='__class__')|first).__mro__ }}",
    "attribute path": "{{ ([messages]|map(attribute='append.__self__.__class__')|first).mro() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "namespace": "{{ namespace.__init__.__globals__.os.popen('id').read() }}",
    "namespace attributes": "{{ namespace(a=1)._Namespace__attrs.clear() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "dict": "{{ dict.__base__.__subclasses__() }}",
    "dict from keys": "{{ dict.fromkeys([1]).__class__.mro() }}",
    "range": "{{ range.__globals__.sys.modules }}",
    "raise_exception": "{{ raise_exception.__globals__.sys.modules.os }}",
    "strftime_now": "{{ strftime_now.__globals__.datetime.sys.modules.os }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "format by alias": "{% set f = '{0.__class__.mro}'.format %}{{ f(1) }}",
    "format by map": "{{ ['{0.__class__}']|map('format', 1)|list }}",
    "format filter": "{{ '%(a)s'|format(a=raise_exception.__globals__) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self's context": "{{ self._TemplateReference__context.environment }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ "
    "m._environment.filters.clear() }}",
    "caller": "{% macro m() %}{{ caller._func.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "loop": "{% for a in [1] %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "loop's class": "{% for a in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "loop's undefined": "{% for a in [1] %}{{ loop._undefined.__init__.__globals__ }}{% endfor %}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_back.f_globals }}",
    "undefined": "{{ nothing.__class__.__init__.__globals__ }}",
    "undefined fails": "{{ nothing._fail_with_undefined_error.__globals__ }}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "from": "{% from 'os' import system %}{{ system('id') }}",
    "include": "{% include ['/etc/passwd', '../../etc/passwd'] %}",
    "extends": "{% extends '/etc/passwd' %}",
    "append": "{{ messages.append(1) }}{{ messages.clear() }}",
    "update": "{{ messages[0].update(role='system') }}{{ messages[0].pop('role') }}",
    "set an attribute": "{% set messages.x = 1 %}",
    "debug": "{% debug %}",
    "environment": "{{ environment }}{{ _meter.x }}{{ context.x }}",
    "own filter": "{{ ''|_joined.__globals__ }}",
}

# Ways to cost: each is one step to the eye, and minutes or gigabytes if nobody counts.
BOMBS = {
    "a list of a namespace": "{% set ns = namespace(x=['a']) %}"
    + "{% set ns.x = [ns.x, ns.x] %}" * 40
    + "{{ [ns] }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ [ns] }}",
    "a key to be hashed": DOUBLED + "{{ {x: 1} }}",
    "a key to be looked up": DOUBLED + "{% set d = {'a': 1} %}{{ d[x] }}",
    "a key to be named": DOUBLED + "{{ messages[x] }}",
    "a keyword": DOUBLED + "{{ nothing|default(default_value=x) }}",
    "digits": "{{ 1|round(100000000, 'ceil') }}",
    "characters to strip": "{{ ('a' * 800000).strip('b' * 800000 ~ 'a') }}",
    "characters to trim": "{{ ('a' * 800000)|trim('b' * 800000 ~ 'a') }}",
    "a test for each": "{{ (['a'] * 40000)|select('in', ['b'] * 40000)|list|length }}",
    "a test for each attribute": "{{ ([{'a': 1}] * 30000)|selectattr('a', 'in', [2] * "
    "30000)|list|length "
    "}}",
    "a filter for each": "{% set b = ['a ' * 500000] * 4 %}{{ "
    "b|map('title')|map('upper')|map('title')|list|length }}",
    "a path for each": "{{ (['a'] * 40000)|map(attribute=" + PATH + ")|list|length }}",
    "a path to sort by": "{{ (['a'] * 40000)|sort(attribute=" + PATH + ")|length }}",
    "a path by unpacking": "{{ (['a'] * 40000)|map(**{'attribute': " + PATH + "})|list|length }}",
    "lazy filters": "{% set g = ['a b ' * 200000] * 4 %}" + LAZY,
    "lazy attributes": "{% set g = ['a'] * 60000 %}"
    + "{% set g = g|map(attribute=0) %}" * 400
    + "{{ g|list|length }}",
    "title": "{{ ('a b ' * 1000000)|title|length }}",
    "upper": "{% set x = 'ΐ' * 1000000 %}" + "{{ x|upper|length }}" * 12,
    "views": "{% set i = dict(range(999)|map('string')|map('list')|map('join', '-')|list) %}{{ "
    "i.items()|max }}",
    "lists in lists": DEEP.replace("GROWN", "[ns.g]") + "{{ ns.g }}",
    "lists in lists as JSON": DEEP.replace("GROWN", "[ns.g]") + "{{ ns.g|tojson }}",
    "lists in lists, compared": DEEP.replace("GROWN", "[ns.g]") + "{{ [ns.g] == [ns.g] }}",
    "tuples in tuples": DEEP.replace("GROWN", "(ns.g,)") + "{{ {ns.g: 1}|length }}",
    "filters in filters": DEEP.replace("GROWN", "ns.g|map('upper')") + "{{ ns.g|first }}",
    "macros in macros": "{% macro m(f) %}{{ f(f) }}{% endmacro %}{{ m(m) }}",
    "a loop's length": "{% for i in range(99999) %}{{ loop.length }}{% endfor %}",
    "a loop in a list": "{% for i in range(99999) %}{{ [loop] }}{% endfor %}",
    "JSON's separators": "{{ ([1] * 9000)|tojson(separators=('a' * 900000, ':')) }}",
    "hexadecimal": "{% set x = ('f' * 900000)|int(0, 16) %}{{ x }}",
    "split": "{% set x = 'a,' * 400000 %}" + "{% set y = x.split(',') %}" * 20,
    "format of a date": "{{ strftime_now('%999999999d' * 9) }}",
    "sum": "{{ ([[1]] * 1000)|sum(start=[])|length }}",
    "batch": "{{ [1]|batch(10 ** 9, 'x')|list|length }}",
    "indent": "{{ 'a'|indent(10 ** 9) }}{{ 'a\n' * 9|indent('x' * 10 ** 9) }}",
    "center": "{{ 'a'.center(10 ** 9) }}{{ 'a'.zfill(10 ** 9) }}{{ 'a'.expandtabs(10 ** 9) }}",
    "translate": "{{ ('a' * 9000).translate({97: 'b' * 900000}) }}",
    "encode": "{{ 'a'.encode('idna') }}",
    "product": "{{ ([0] * 10 ** 5) * 10 ** 5 }}",
}

# In a process of its own: no type checks of the test run that slow it down, little memory, and a
# bound on its time.
RUNNER = """
import json, random, re, resource, sys, time
from llama_jax.errors import InputError
from llama_jax.text.sandbox import render

sources, seeds, count = json.load(sys.stdin)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
rng = random.Random(0)
parts = [re.findall(r"{[%{#]-?|-?[%}#]}|'[^']*'|[A-Za-z_]+|[0-9]+|\\\\s+|.", source) for source in seeds]
words = {word for part in parts for word in part if len(word) < 40}
words = sorted(words | {"__class__", "99999", "*", "~", "namespace", "|map"})

def mutated():
    part = list(rng.choice(parts))
    for _ in range(rng.randrange(1, 5)):
        at, other = rng.randrange(len(part) + 1), rng.choice(parts)
        where = rng.randrange(len(other) + 1)
        kind = rng.randrange(5)
        if kind == 0: part[at:at + rng.randrange(1, 4)] = []
        elif kind == 1: part.insert(at, rng.choice(words))
        elif kind == 2: part[at:at + 1] = [rng.choice(words)]
        elif kind == 3: part[at:at] = other[where:where + rng.randrange(1, 30)]
        else: part[at:at] = part[at:at + rng.randrange(1, 20)] * rng.randrange(1, 6)
    return "".join(part)

def outcomes(templates):
    for source in templates:
        messages = [{"role": role, "content": " hi </s> "} for role in ("system", "user", "assistant", "user")]
        before, start = json.dumps(messages), time.process_time()
        try:
            text, refusal = render(source, {"messages": messages, "bos_token": "<s>", "add_generation_prompt": True}), None
        except InputError as error:
            text, refusal = None, str(error)
        seconds = round(time.process_time() - start, 3)
        yield {"source": source[:300], "text": text and text[:200], "size": len(text or ""), "refusal": refusal,
               "seconds": seconds, "changed": json.dumps(messages) != before}

json.dump(list(outcomes([*sources, *(mutated() for _ in range(count))])), sys.stdout)
"""


def outcomes(sources: list[str], seeds: list[str], count: int) -> list[dict[str, Any]]:
    """What becomes of templates, and of mutations of others."""
    handed = json.dumps([sources, seeds, count])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=handed, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def bounded(outcome: dict[str, Any]) -> bool:
    """Whether a template did no harm: text or one line, little output, little time, no memory
    error, messages untouched.
    """
    refusal = outcome["refusal"] or ""
    in_words = outcome["refusal"] is None or (
        refusal.startswith("chat template: ") and "\n" not in refusal
    )
    in_bounds = (
        outcome["size"] <= LARGEST_OUTPUT and outcome["seconds"] < 3 and "emory" not in refusal
    )
    return in_words and in_bounds and not outcome["changed"]


MUTATIONS = rounds(400, 2200)
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux holds a process to its address space"
)


@pytest.mark.parametrize("name", ESCAPES)
def test_there_is_no_way_out(name: str):
    with pytest.raises(InputError, match=r"^chat template: "):
        render(ESCAPES[name], {"messages": [{"role": "user", "content": "hi"}]})


@linux
def test_nothing_costs_more_than_it_may():
    found = outcomes(list(BOMBS.values()), [""], 0)
    assert len(found) == len(BOMBS)
    assert [outcome for outcome in found if not bounded(outcome)] == []


@linux
def test_mutations_of_templates():
    formats = [make("<s>", "</s>").source for make in FORMATS.values()]
    hostile = [
        source
        for source in [*HOSTILE.values(), *ESCAPES.values(), *BOMBS.values()]
        if len(source) < 400
    ]
    found = outcomes([], [*[*formats, LLAMA2, LLAMA3] * 8, *ORDINARY * 4, *hostile], MUTATIONS)
    assert [outcome for outcome in found if not bounded(outcome)] == []
    still_mean_something = sum(outcome["refusal"] is None for outcome in found)
    assert MUTATIONS / 22 < still_mean_something < MUTATIONS * 10 / 11


def test_values_too_deep_for_the_stack_are_refused():
    with pytest.raises(InputError, match=r"^chat template: it nests values more than 200 deep$"):
        render(BOMBS["tuples in tuples"], {"messages": []})


LAZINESS = (
    "{% set few = messages|selectattr('role', 'equalto', 'nobody') %}{{ 'true' if few "
    "}}{{ few|list }}"
    "{% set all = messages|map(attribute='role') %}{{ all|first }}{{ all|list }}{{ all|list }}"
)


def test_lazy_filters_are_still_true_and_used_up_as_in_transformers():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (expected,), _ = render_jinja_template([messages], chat_template=LAZINESS)
    assert render(LAZINESS, {"messages": messages}) == expected
