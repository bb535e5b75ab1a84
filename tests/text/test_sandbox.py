"""What chat templates may do: the same as in transformers; and what hostile ones may not: anything
large, long or outside.
"""

import json
import subprocess
import sys
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llama_jax.errors import InputError
from llama_jax.text.sandbox import render

MESSAGES = [
    {"role": "system", "content": " be brief \n"},
    {"role": "user", "content": "<b>hi</b> 'ü' {{ x }}"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\nhello"},
    {"role": "user", "content": "a,b"},
]

ORDINARY = [
    "{% for m in messages %}\n  {% if not loop.first %}, {% endif %}\n{{ m.role ~ ': ' ~ "
    "m['content']|trim }}\n{% endfor %}\n",
    "{{ messages|length }} {{ messages[1:]|length }} {{ messages[::-1][0].content }} {{ "
    "messages[-1]['content'][0] }}",
    "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text + m.role %}{% endfor %}{{ ns.n * 2 - 1 }}{{ ns.text }}",
    "{{ messages|tojson }}{{ {'b': 1, 'a': [true, none, 1.5]}|tojson(indent=4) }}{{ "
    "[1]|tojson(separators=(',', ':')) }}",
    "{% macro turn(m, end='!') %}<{{ m.role }}>{{ m.content }}{{ end }}{% endmacro %}"
    "{{ turn(messages[0]) }}{{ turn(messages[1], end='?') }}",
    "{{ messages|map(attribute='role')|join('/') }} {{ messages|selectattr('role', "
    "'equalto', 'user')|list|length }}",
    "{{ messages|rejectattr('role', 'in', ['user'])|map(attribute='content')|map('upper')|list }}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\n') }} {{ ', '.join(['a', "
    "'b']) }} {{ 'aXa'.replace('a', 'b') }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{% if "
    "loop.first %}{% continue %}{% endif %}"
    "{{ loop.index }}{{ loop.index0 }}{{ loop.length }}{{ loop.last }}{{ loop.previtem.role }}"
    "{{ loop.nextitem.role }}{% endfor %}",
    "{{ tools is defined }}{{ tools is none }}{{ nothing is defined }}{{ nothing }}{{ "
    "nothing|default('d') }}"
    "{{ 'a' if nothing }}",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% generation %}words{% endgeneration %}{% filter upper|trim %} loud {% endfilter %}"
    "{% set t %}[{{ 1 }}]{% endset %}{{ t }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ (b, a) }}{{ [a, b] + [3] }}{{ 'ab' * 3 }}{{ 7 // 2 "
    "}}{{ 7 % 4 }}{{ 2 ** 5 }}"
    "{{ -a }}{{ 7 / 2 }}",
    "{{ 'content' in messages[0] }}{{ 'hi' in messages[1].content }}{{ messages[0].get('x', 'y') }}"
    "{{ 'ab'[::-1] }}{{ 1 < 2 < 3 }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ dict(a=1) }}{{ "
    "range(3)|list }}{{ 'A'|lower }}",
    "{{ messages[0].content is string }}{{ messages is iterable }}{{ messages[0] is "
    "mapping }}{{ 3 is odd }}{{ '7'|int + 1 }}",
    "{{ (messages|first).role }}{{ (messages|last).role }}{{ "
    "messages|map(attribute='role')|unique|sort|join(',') }}",
    "x\n    {%- if true %}\n  y  {{- ' z ' -}}  \n{% endif %}\n\n{# gone #}\nend\n",
]


@pytest.mark.parametrize("source", ORDINARY)
def test_templates_mean_what_they_mean_in_transformers(source: str):
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=source, tools=None)
    ours = render(source, {"messages": MESSAGES, "tools": None, "add_generation_prompt": False})
    if (
        "tools" not in source
    ):  # what no tools are differs between versions of transformers: None or an empty list
        assert ours == expected
    else:
        assert ours == "TrueTrueFalsed"


def test_now_is_the_date():
    assert render("{{ strftime_now('%Y') }}", {}) in {
        time.strftime("%Y"),
        str(int(time.strftime("%Y")) - 1),
    }


def nested(start: str, step: str, end: str) -> str:
    """A start, a step that doubles something forty times, and a use of it."""
    return start + step * 40 + end


MACROS = "".join(
    f"{{% macro m{n + 1}() %}}{{{{ m{n}() }}}}{{{{ m{n}() }}}}{{% endmacro %}}" for n in range(40)
)
LONG = "{% set b = 'a' * 900000 %}{% set many = [" + "b," * 9000 + "] %}"
PAIR = "{% set x = ['a'] %}{% set y = ['a'] %}"

HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "function globals": "{{ raise_exception.__globals__.x }}",
    "code": "{{ strftime_now.__code__.co_code }}",
    "attr": "{{ messages|attr('__class__') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "repetition": "{{ ('a'*10**9)|length }}",
    "repetition, reversed": "{{ (10**9*'a')|length }}",
    "list repetition": "{{ ([[0]*1000]*1000*1000)|length }}",
    "power": "{{ 9**9**7 }}",
    "powers": "{{ 9**9**9 }}",
    "squares": nested("{% set x = 99999999 %}", "{% set x = x * x %}", "{{ x is odd }}"),
    "long number": "{{ 0x" + "f" * 60_000 + " // 3 }}",
    "concatenation": nested("{% set x = 'a' %}", "{% set x = x ~ x %}", "{{ x|length }}"),
    "sum": nested("{% set x = 'a' %}", "{% set x = x + x %}", "{{ x|length }}"),
    "captured": nested(
        "{% set x = 'a' %}", "{% set x %}{{ x }}{{ x }}{% endset %}", "{{ x|length }}"
    ),
    "macros": "{% macro m0() %}aaaa{% endmacro %}" + MACROS + "{{ m40()|length }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for i in [range(9)] recursive %}{{ loop(i) }}{% endfor %}",
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "text in a loop": "{% set x %}{% for a in range(99999) %}"
    + "z" * 60_000
    + "{% endfor %}{% endset %}",
    "output": "{% for i in range(99999) %}" + "y" * 60 + "{% endfor %}",
    "nesting": nested(PAIR, "{% set x = [x, x] %}", "{{ x }}"),
    "tuples": nested(PAIR, "{% set x = (x, x) %}", "{{ x|string }}"),
    "nesting, compared": nested(PAIR, "{% set x = [x, x] %}{% set y = [y, y] %}", "{{ x == y }}"),
    "nesting as JSON": nested(PAIR, "{% set x = {'a': x, 'b': x} %}", "{{ x|tojson }}"),
    "nesting, joined": nested(PAIR, "{% set x = [x, x] %}", "{{ x|join }}"),
    "nesting by dict": nested(PAIR, "{% set x = dict(a=x, b=x) %}", "{{ x }}"),
    "%": "{{ '%999999999d' % 1 }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "center": "{{ 'a'|center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "to_bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "lipsum": "{{ lipsum(n=999999) }}",
    "replace": "{{ ('a'*100000).replace('a', 'b'*100000)|length }}",
    "replace filter": "{{ ('a'*100000)|replace('a', 'b'*100000)|length }}",
    "join": "{{ ('a'*1000000).join(range(90000)|map('string')|list)|length }}",
    "join filter": "{{ range(90000)|join('a'*1000000)|length }}",
    "indentation": "{{ [1]|tojson(indent=999999999) }}",
    "slices": "{% set x = 'a' * 900000 %}"
    + "".join(f"{{% set a{n} = x[1:] %}}" for n in range(2000)),
    "map": LONG + "{{ many|map('upper')|list|length }}",
    "sort": LONG + "{{ many|sort|length }}",
    "membership": "{% set a = 'a' * 900000 + 'x' %}{% set b = 'a' * 900000 + 'y' %}{{ a in [b] * "
    "90000 "
    "}}",
    "long output": "{{ 'a' * 1048577 }}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "long sum": "{{ " + "1+" * 20_000 + "1 }}",
    "blocks": "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
    "source": "x" * 65_537,
}


# In a process of its own, where no type checks of the test run slow it down, with an address space
# too small for a template that makes something large: the refusal would then be a MemoryError, and
# say so.
PROBE = """
import json, resource, sys, time
from llama_jax.errors import InputError
from llama_jax.text.sandbox import render

sources, messages = json.load(sys.stdin)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
refusals = []
for source in sources:
    start = time.process_time()
    try:
        refusal = "accepted " + render(source, {"messages": messages})[:99]
    except InputError as error:
        refusal = str(error)
    refusals.append((time.process_time() - start, refusal))
json.dump(refusals, sys.stdout)
"""


SPOT = (
    "globals",
    "mutation",
    "range",
    "repetition",
    "recursion",
    "%",
    "join",
    "parentheses",
    "source",
)


@pytest.mark.parametrize(
    "name",
    [name if name in SPOT else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE],
)
def test_hostile_templates_are_refused(name: str):
    """Here as well, whatever the platform; those that use up their whole budget are in the process
    of their own.
    """
    with pytest.raises(InputError, match=r"^chat template: ") as refusal:
        render(HOSTILE[name], {"messages": MESSAGES})
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux holds a process to its address space"
)
def test_hostile_templates_are_refused_quickly_and_in_little_memory():
    given = json.dumps([list(HOSTILE.values()), MESSAGES])
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=given, capture_output=True, text=True, check=True
    )
    found = dict(zip(HOSTILE, json.loads(done.stdout), strict=True))
    assert {
        name: words
        for name, (_, words) in found.items()
        if not words.startswith("chat template: ") or "\n" in words
    } == {}
    assert {name: seconds for name, (seconds, _) in found.items() if seconds >= 2} == {}
    assert {name: words for name, (_, words) in found.items() if "emory" in words} == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only\nusers') }}", "Only users"),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ messages[9].role }}", "list object has no element 9"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 'a' % 1 }}", "operator % is for numbers, str and int given"),
        ("{{ messages|nonesuch }}", "No filter named 'nonesuch'"),
        ("{{ self }}", "it prints a TemplateReference"),
    ],
)
def test_errors_are_one_line_in_the_templates_words(source: str, message: str):
    with pytest.raises(InputError, match=f"^chat template: .*{message}"):
        render(source, {"messages": MESSAGES})


def test_a_long_conversation_is_within_the_budget():
    template = ORDINARY[0] + ORDINARY[3].split("{{ {")[0] + ORDINARY[7]
    messages = [{"role": "user", "content": "x" * 1000}] * 400
    assert len(render(template, {"messages": messages})) > 800_000
