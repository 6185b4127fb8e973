import hypothesis
import hypothesis.strategies as st
import pytest

from moeq_jax import registry

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda n: n not in ("lambda", "is", "if", "in"))
floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | floats | st.text(max_size=6)
values = scalars | st.lists(scalars, max_size=3).map(tuple) | st.lists(st.integers(), max_size=2)
specs = st.builds(
    lambda name, args, kwargs: registry.Spec(name, tuple(args), kwargs),
    names, st.lists(values, max_size=2), st.dictionaries(names, values, max_size=3))


def rtn(weight, statistics, *, group=64, clip=True):
  return weight, statistics, group, clip


def knapsack(cost, *, alpha=1.0):
  return cost, alpha


codecs = registry.Registry("codec", {"rtn": rtn, "gptq": rtn})
methods = registry.Registry("method", {"knapsack": knapsack})


@pytest.mark.parametrize(("text", "name", "args", "kwargs"), [
    ("rtn", "rtn", (), {}),
    (" rtn() ", "rtn", (), {}),
    ("rtn(group=64)", "rtn", (), {"group": 64}),
    ("f(-1, 2.5, 'x', b=(1, 2), c=None, d=True)", "f", (-1, 2.5, "x"), {"b": (1, 2), "c": None, "d": True}),
    ("knapsack(router_grad_error)", "knapsack", ("router_grad_error",), {}),
    ("knapsack(fisher_error, alpha=0.5)", "knapsack", ("fisher_error",), {"alpha": 0.5}),
    ("knapsack( power( fisher , exponent = 2 ) )", "knapsack", ("power(fisher, exponent=2)",), {}),
    ("knapsack(cost=fisher)", "knapsack", (), {"cost": "fisher"}),
])
def test_parse(text, name, args, kwargs):
  assert registry.parse(text) == registry.Spec(name, args, kwargs)


@pytest.mark.parametrize("text", [
    "", "3", "'rtn'", "rtn(", "rtn)", "a b", "a.b", "a.b(1)", "a(1)(2)", "a + b", "a[0]", "True", "a\0b",
    "a(b + 1)", "a(b.c)", "a(*b)", "a(**b)", "a(x=1, x=2)", "a(x for x in b)", "a(lambda: 1)", "a(b[0])", "a(b := 1)",
    "a(1e999)", "a((1, 1e999))", "a(1j)", "a({1: 2})", "a(b'x')", "a(...)", "a(f'{b}')",
])
def test_what_is_not_a_spec_is_refused(text):
  with pytest.raises(registry.SpecError):
    registry.parse(text)


def test_nothing_is_evaluated():
  with pytest.raises(registry.SpecError, match="stands where a name is needed"):
    registry.parse("__import__('os').system('false')")
  assert registry.parse("f(open('x'))").args == ("open(x)",)


@pytest.mark.parametrize(("text", "normal", "file"), [
    ("rtn()", "rtn", "rtn"),
    ("rtn( group = 64 , clip=False )", "rtn(clip=False, group=64)", "rtn-clip=False,group=64"),
    ("knapsack('fisher', alpha=0.50)", "knapsack(fisher, alpha=0.5)", "knapsack-fisher,alpha=0.5"),
    ("f('two words')", "f('two words')", None),
    ("f('True')", "f('True')", None),
    ("f(g(h, 1))", "f(g(h, 1))", None),
])
def test_canonical_and_filename(text, normal, file):
  assert registry.canonical(text) == normal
  assert registry.filename(text) == registry.filename(normal)
  if file:
    assert registry.filename(text) == file


@hypothesis.given(specs)
def test_the_normal_form_is_read_back_as_the_same_spec(spec):
  text = registry.canonical(spec)
  assert registry.parse(text) == spec
  assert registry.canonical(text) == text


@hypothesis.given(specs, specs)
def test_file_names_are_safe_and_differ_where_specs_differ(one, other):
  for spec in (one, other):
    file = registry.filename(spec)
    assert len(file) <= 120
    assert set(file) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.=+,-")
    assert file[0] not in ".-"
  same = registry.canonical(one) == registry.canonical(other)
  assert (registry.filename(one) == registry.filename(other)) == same


@pytest.mark.parametrize(("one", "other"), [
    ("a(b, c)", "a(b(c))"), ("a(b(c), d)", "a(b(c, d))"), ("a(1)", "a('1')"), ("a(b='x y')", "a(b='x_y')"),
    ("a(-1)", "a(1)"), ("a(1, 1)", "a((1, 1))"), ("a(" + "x" * 200 + ")", "a(" + "x" * 201 + ")"),
])
def test_file_names_of_near_specs_differ(one, other):
  assert registry.filename(one) != registry.filename(other)


@pytest.mark.parametrize("text", ["..", ".", "", "a/b", "-rf", "é", "a\nb", "a" * 121])
def test_safe_name(text):
  safe = registry.safe_name(text)
  assert safe != text
  assert registry.safe_name(safe) == safe


def test_get_binds_the_arguments_of_the_spec():
  assert codecs.get("rtn(group=32)")("w", "s") == ("w", "s", 32, True)
  assert codecs.get("gptq")("w", "s", clip=False) == ("w", "s", 64, False)
  assert methods.get("knapsack(fisher, alpha=2)")() == ("fisher", 2)
  assert methods.get(registry.Spec("knapsack", ("fisher",)))() == ("fisher", 1.0)
  assert codecs.names() == ["gptq", "rtn"]


def test_an_unknown_name_is_told_the_nearest_and_all():
  with pytest.raises(registry.UnknownNameError, match="unknown codec 'gtpq'; did you mean 'gptq'.*gptq, rtn"):
    codecs.get("gtpq(group=64)")
  with pytest.raises(ValueError, match=r"unknown codec 'zzz' \(codecs: gptq, rtn\)"):
    codecs.get("zzz")


@pytest.mark.parametrize(("table", "spec", "said"), [
    (codecs, "rtn(gruop=3)", r"unknown option 'gruop'; did you mean 'group'\? \(options of codec 'rtn': group, clip\)"),
    (codecs, "rtn(weight=3)", "unknown option 'weight'"),
    (codecs, "rtn(1, 2, 3)", "at most 2 positional"),
    (methods, "knapsack(a, cost=b)", "'cost' is given twice"),
])
def test_arguments_that_an_entry_does_not_take(table, spec, said):
  with pytest.raises(TypeError, match=said):
    table.get(spec)
  with pytest.raises(ValueError, match=said):
    table.get(spec)


def test_an_entry_may_take_anything():
  table = registry.Registry("thing", {"any": lambda *args, **kwargs: (args, kwargs)})
  assert table.get("any(1, 2, x=3)")(4) == ((1, 2, 4), {"x": 3})
