import pytest

from configs import common


def test_options_are_read_into_the_types_of_their_defaults():
  options = common.parse_arg("smoke, budget=3,name=a=b,limit=7", smoke=False, budget=2.5, name="x", limit=None, seed=0)
  assert options.to_dict() == {"smoke": True, "budget": 3.0, "name": "a=b", "limit": 7, "seed": 0}
  assert isinstance(options.budget, float)
  assert common.parse_arg("smoke=false", smoke=True).smoke is False


@pytest.mark.parametrize("arg", [None, "", " , "])
def test_no_options_leave_the_defaults(arg: str | None):
  assert common.parse_arg(arg, smoke=True, seed=3).to_dict() == {"smoke": True, "seed": 3}


def test_the_result_is_locked():
  with pytest.raises(AttributeError):
    common.parse_arg("", smoke=False).smok = True


@pytest.mark.parametrize(("arg", "said"), [
    ("smok", "unknown config option 'smok'; did you mean 'smoke'"),
    ("smoke=3", "bool expected"),
    ("seed=2.5", "int expected"),
    ("seed=true", "int expected"),
    ("seed=", "int expected"),
    ("seed", "needs a value"),
    ("seed=1,seed=2", "given twice"),
])
def test_what_is_wrong_is_explained(arg: str, said: str):
  with pytest.raises(ValueError, match=said):
    common.parse_arg(arg, smoke=False, seed=0)
