"""Pairs of text and summary: what is read from a file, and that nothing held out gets into training."""

import json
import textwrap

import pytest

from moeq_jax import data, pairs

SOURCE = textwrap.dedent('''
    import os

    @os.cache
    def first(a, b):
      """Adds two numbers of any kind. And more.

      Args: none.
      """
      # a comment stays
      return a + b + 10_000

    class Thing:
      def method(self):
        r"""Says what the thing
        really does
        """
        value = self.other
        return value

      def undocumented(self):
        return 1

      def only_words(self):
        """Nothing but a docstring is here."""

      def in_one_line(self): """This one shares its line."""; return 3

      def short(self):
        """Too short."""
        x = 1
        return x

    async def last():
      """Waits for the very last thing!  Really."""
      x = 1
      return "unusual"
    ''')


def document(text: str = SOURCE, name: str = "a/b.py") -> data.Document:
  return data.Document("code", name, text)


def test_functions_of_a_file():
  found = list(pairs.functions(document()))
  assert [(p.name, p.summary) for p in found] == [
      ("a/b.py:first", "Adds two numbers of any kind."),
      ("a/b.py:method", "Says what the thing really does"),
      ("a/b.py:last", "Waits for the very last thing!"),
  ]
  assert found[0].text == "@os.cache\ndef first(a, b):\n  # a comment stays\n  return a + b + 10_000"
  assert found[1].text == "def method(self):\n  value = self.other\n  return value"


def test_a_summary_never_stands_in_its_text():
  copied = 'def f(x):\n  """Adds one to x."""\n  y = x  # Adds one to x.\n  return y\n'
  assert list(pairs.functions(document(copied))) == []
  assert all(p.summary not in p.text for p in pairs.functions(document()))


def test_a_docstring_that_begins_with_a_section_has_no_summary():
  assert list(pairs.functions(document('def f(x):\n  """Args: x: a number to add to."""\n  y = x\n  return y\n'))) == []


def test_files_that_are_not_python_have_no_functions():
  assert list(pairs.functions(document("def f(:\n"))) == []


def test_first_sentence():
  assert pairs.first_sentence("  One e.g.x 3.5 two. Three") == "One e.g.x 3.5 two."
  assert pairs.first_sentence("\n    Over\n    lines\n\n    Next paragraph.\n") == "Over lines"


def pair(text: str, summary: str, domain: str = "code") -> pairs.Pair:
  return pairs.Pair(domain, text, text, summary)


def test_code_is_distinct_by_text_and_by_summary_but_articles_share_descriptions():
  given = [pair("a b", "one"), pair("A  (b)", "two"), pair("c", "One!"), pair("d", "three")]
  assert [p.text for p in pairs.distinct(given, set())] == ["a b", "d"]
  wiki = [pair("x", "American actor", "wiki"), pair("y", "American actor", "wiki"), pair("x", "other", "wiki")]
  assert [p.text for p in pairs.distinct(wiki, set())] == ["x", "y"]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path):
  """A training and a held-out package and six articles, which share some of their text."""
  shared = "  value = compute_something_long(x)\n  other = compute_something_else(value)\n"
  function = lambda name, summary, body: f'def {name}(x):\n  """{summary}"""\n{body}  return x\n'
  texts = {
      "kept-out": function("held", "The held out function.", shared + "  a_line_of_its_own_here = 1\n"),
      "trained": function("held", "Another text altogether.", shared + "  a_line_of_its_own_here = 1\n") +  # its text
                 function("f", "The held-out FUNCTION", "  y = 1\n") +  # its summary
                 function("g", "Copies most of its lines.", shared) +
                 function("h", "Is of its own kind.", "  something_else_entirely = x\n"),
  }
  monkeypatch.setattr(data, "TRAIN_PACKAGES", {"trained": "1"})
  monkeypatch.setattr(data, "HELD_OUT_PACKAGES", {"kept-out": "1"})
  monkeypatch.setattr(data, "package_files", lambda name, version: iter([document(texts[name], name)]))
  titles = [f"Article {i}" for i in range(60)]
  path = tmp_path / "summaries.json"
  path.write_text(json.dumps({t: {"extract": f"Text of {t}.", "description": "Kind of article"} for t in titles}))
  monkeypatch.setattr(data, "asset", lambda *_: path)
  return titles


def test_no_held_out_function_or_article_is_in_training(packages: list[str]):
  apart, trained = pairs.held_out(), pairs.training()
  assert [p.name for p in apart if p.domain == "code"] == ["kept-out:held"]
  assert [p.name for p in trained if p.domain == "code"] == ["trained:h"]
  names = lambda found: {p.name for p in found if p.domain == "wiki"}
  assert names(apart) == {t for t in packages if data.is_held_out(t)} != set()
  assert names(apart) | names(trained) == set(packages) and not names(apart) & names(trained)


def test_reading_twice_gives_the_same_pairs(packages: list[str]):
  assert pairs.training() == pairs.training() and pairs.held_out() == pairs.held_out()


def test_the_real_held_out_pairs():
  """From the pinned packages: enough of both kinds, and none among the training pairs that are read in seconds."""
  apart = pairs.held_out()
  count = {domain: sum(p.domain == domain for p in apart) for domain in pairs.DOMAINS}
  assert count == {"code": 821, "wiki": 496}
  trained = pairs.training(few=True)
  for domain in pairs.DOMAINS:
    texts = {pairs.plain(p.text) for p in trained if p.domain == domain}
    assert not texts & {pairs.plain(p.text) for p in apart if p.domain == domain}
  summaries = {pairs.plain(p.summary) for p in trained if p.domain == "code"}
  assert not summaries & {pairs.plain(p.summary) for p in apart if p.domain == "code"}


def test_xsum_is_there_for_evaluation():
  found = pairs.xsum()
  assert len(found) == 999 and all(p.text and p.summary and p.domain == "xsum" for p in found)
