"""How a valid checkpoint is spoilt: mutations of its files by kind, each determined by its number.

A mutation takes the files of a checkpoint by name and a random generator, and gives the files back with one of them
changed. None knows how the files are read.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
Files = dict[str, bytes]
Rng = np.random.Generator

NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, 5, -1, -2**31, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
                            10**400, 0.5, 1.0, 1e30, 1e308, True, False, None, "", "7", [], [3], {})
BOMBS = ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" + "[]," * 300_000 + "0]",
         "9" * 5000, "1e999", "NaN", "-Infinity", '"\\ud800"', '"' + "x" * 300_000 + '"', "\t" * 1000 + "0", "tru",
         "'a'", "01", "+1", "[1,]", "-")
PATHS = ("../model.safetensors", "/etc/passwd", "..", ".", "", "a/model.safetensors", "..\\x.safetensors", "\0",
         "x" * 5000, "model.bin", "nowhere.safetensors", "model-00001-of-00003.safetensors",
         "model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json", "\ud800.safetensors",
         "con\nfig.safetensors", "~/x.safetensors")
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I32", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "F32 ", "NAN")


def pick(rng: Rng, options: Any) -> Any:
  """One of the options."""
  options = list(options)
  return options[int(rng.integers(len(options)))]


def weights_file(rng: Rng, files: Files) -> str:
  return pick(rng, sorted(name for name in files if name.endswith(".safetensors")))


def split(data: bytes) -> tuple[bytes, bytes]:
  """The header's text and the payload of a safetensors file."""
  end = 8 + int.from_bytes(data[:8], "little")
  return data[8:end], data[end:]


def joined(text: bytes, payload: bytes) -> bytes:
  return len(text).to_bytes(8, "little") + text + payload


def flipped(rng: Rng, data: bytes, first: int, end: int) -> bytes:
  """One to three bytes between `first` and `end` changed: one bit, or to any value, or to one that matters in JSON."""
  spoilt = bytearray(data)
  for place in rng.integers(first, end, int(rng.integers(1, 4))):
    how = rng.integers(3)
    spoilt[place] = (spoilt[place] ^ (1 << int(rng.integers(8))), int(rng.integers(256)),
                     pick(rng, b'"{}[],:-0123456789eE.\\ '))[how]
  return bytes(spoilt)


def cut(rng: Rng, data: bytes) -> bytes:
  """A beginning of the data, the data twice, a piece left out, or something behind it."""
  place = int(rng.integers(0, len(data)))
  near = max(0, len(data) - int(rng.integers(1, 70)))
  piece = data[:place] + data[place + int(rng.integers(1, 64)):]
  return pick(rng, (data[:place], data[:near], piece, data + bytes(int(rng.integers(1, 64))), data + data))


# ---------------------------------------------------------------------------------------------------------------------
# JSON as text: so that keys can be there twice, and values be none
# ---------------------------------------------------------------------------------------------------------------------


class Raw(str):
  """Text that is written as it is where a value is expected."""


def dump(value: Any) -> str:
  """JSON of a value; objects are dicts or lists of pairs (`Pairs`)."""
  if isinstance(value, Raw):
    return str(value)
  if isinstance(value, Pairs | dict):
    pairs = value.items() if isinstance(value, dict) else value
    return "{" + ",".join(f"{json.dumps(key)}:{dump(inside)}" for key, inside in pairs) + "}"
  if isinstance(value, list):
    return "[" + ",".join(map(dump, value)) + "]"
  return json.dumps(value)


class Pairs(list):
  """An object whose keys may be there twice."""


def edited(rng: Rng, value: dict[str, Any]) -> Pairs:
  """An object with one of its entries, or one inside them, changed, left out, doubled, renamed or added."""
  pairs = Pairs(value.items())
  at = int(rng.integers(len(pairs)))
  key, inside = pairs[at]
  how = rng.integers(8)
  if how < 3 and isinstance(inside, dict) and inside:
    pairs[at] = key, edited(rng, inside)
  elif how < 4 and isinstance(inside, list) and inside:
    place = int(rng.integers(len(inside)))
    pairs[at] = key, [*inside[:place], number(rng, inside[place]), *inside[place + 1:]]
  elif how < 5:
    pairs[at] = key, number(rng, inside)
  elif how == 5:
    pairs.insert(int(rng.integers(len(pairs) + 1)), (key, inside if rng.integers(2) else number(rng, inside)))
  elif how == 6:
    pairs.pop(at)
  else:
    name = key[: int(rng.integers(len(key) + 1))] + pick(rng, ("", "x", "0", "9" * 50, ".", "\n", "\ud800", "é"))
    pairs[at] = (name if rng.integers(2) else pick(rng, value)), inside
  return pairs


def number(rng: Rng, value: Any) -> Any:
  """Another value in place of one."""
  how = rng.integers(4)
  if how == 0 and type(value) is int:
    return value + int(pick(rng, (-2, -1, 1, 2, 4, 64))) if rng.integers(2) else value * int(pick(rng, (-1, 2, 10**9)))
  if how == 1:
    return Raw(pick(rng, BOMBS))
  return pick(rng, NUMBERS + DTYPES[:6])


# ---------------------------------------------------------------------------------------------------------------------
# The kinds
# ---------------------------------------------------------------------------------------------------------------------


def header_bytes(rng: Rng, files: Files) -> Files:
  name = weights_file(rng, files)
  return files | {name: flipped(rng, files[name], 0, len(split(files[name])[0]) + 8)}


def header_length(rng: Rng, files: Files) -> Files:
  name = weights_file(rng, files)
  length = int.from_bytes(files[name][:8], "little")
  other = pick(rng, (0, 1, length - 1, length + 1, length + int(rng.integers(-100, 100)), len(files[name]) - 8,
                     len(files[name]), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1, int(rng.integers(2**62))))
  return files | {name: other.to_bytes(8, "little") + files[name][8:]}


def lengths(rng: Rng, files: Files) -> Files:
  name = weights_file(rng, files)
  return files | {name: cut(rng, files[name])}


def header_entries(rng: Rng, files: Files) -> Files:
  name = weights_file(rng, files)
  text, payload = split(files[name])
  return files | {name: joined(dump(edited(rng, json.loads(text))).encode(errors="surrogatepass"), payload)}


def header_tensor(rng: Rng, files: Files) -> Files:
  """One tensor's type, shape or offsets, alone or together with another's, so that the header may stay consistent."""
  name = weights_file(rng, files)
  text, payload = split(files[name])
  infos = json.loads(text)
  one, two = (pick(rng, [key for key in infos if key != "__metadata__"]) for _ in range(2))
  info = infos[one]
  how = rng.integers(8)
  if how == 0:
    info["dtype"] = pick(rng, DTYPES)
  elif how == 1:
    info["shape"] = info["shape"][::-1]
  elif how == 2:
    info["shape"] = pick(rng, ([], [1, *info["shape"]], [int(np.prod(info["shape"]))], [0], [2**32, 2**32], [1] * 70))
  elif how == 3:
    info["data_offsets"] = [edge + int(pick(rng, (-4, -1, 1, 4, 2**40, -2**40))) for edge in info["data_offsets"]]
  elif how == 4:
    info["data_offsets"], infos[two]["data_offsets"] = infos[two]["data_offsets"], info["data_offsets"]
  elif how == 5:
    infos[one], infos[two] = infos[two], infos[one]
  elif how == 6:
    info["data_offsets"] = infos[two]["data_offsets"]
  else:
    place = int(rng.integers(2))
    info["data_offsets"][place] = number(rng, info["data_offsets"][place])
  return files | {name: joined(dump(infos).encode(), payload)}


def index(rng: Rng, files: Files) -> Files:
  data = files[INDEX]
  how = rng.integers(6)
  if how == 0:
    return files | {INDEX: flipped(rng, data, 0, len(data))}
  if how == 1:
    return files | {INDEX: cut(rng, data)}
  if how == 2:
    return files | {INDEX: dump(edited(rng, json.loads(data))).encode(errors="surrogatepass")}
  value = json.loads(data)
  places = value["weight_map"]
  tensor = pick(rng, places)
  if how == 3:
    places[tensor] = pick(rng, PATHS)
  elif how == 4:
    places[tensor] = pick(rng, places.values())
  else:
    file = pick(rng, PATHS + NUMBERS)
    places.update({name: file for name, other in places.items() if other == places[tensor]})
  return files | {INDEX: dump(value).encode(errors="surrogatepass")}


def shards(rng: Rng, files: Files) -> Files:
  """Whole files missing, exchanged or empty."""
  one, two = (weights_file(rng, files) for _ in range(2))
  how = rng.integers(3)
  if how == 0:
    return {name: data for name, data in files.items() if name != one}
  return files | ({one: files[two], two: files[one]} if how == 1 else {one: b""})


def config(rng: Rng, files: Files) -> Files:
  data = files["config.json"]
  how = rng.integers(5)
  if how == 0:
    return files | {"config.json": flipped(rng, data, 0, len(data))}
  if how == 1:
    return files | {"config.json": cut(rng, data)}
  return files | {"config.json": dump(edited(rng, json.loads(data))).encode(errors="surrogatepass")}


def payload(rng: Rng, files: Files) -> Files:
  name = weights_file(rng, files)
  data = files[name]
  return files | {name: flipped(rng, data, 8 + len(split(data)[0]), len(data))}


KINDS: dict[str, Callable[[Rng, Files], Files]] = {
    "header_bytes": header_bytes, "header_length": header_length, "lengths": lengths, "header_entries": header_entries,
    "header_tensor": header_tensor, "index": index, "shards": shards, "config": config, "payload": payload}
