"""Makes compressed.safetensors with compressed-tensors: `python make_compressed.py`, in the interop environment.

Small random integer matrices at 2, 3, 4 and 8 bits, whose rows fill whole words or not, with a scale per row or per
group, packed by the library's own compressor. Each case is the tensors `CASE.codes` (int8, what the library should
find) and `CASE.weight_packed`, `CASE.weight_scale`, `CASE.weight_shape`; the metadata says who made them.
"""

import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

CASES = {"whole": (6, 64, None), "odd": (5, 37, None), "one": (3, 1, None), "grouped": (4, 96, 32)}  # N, K, group
DTYPES = {2: torch.float32, 3: torch.bfloat16, 4: torch.float32, 8: torch.bfloat16}  # of scales


def case(bits: int, rows: int, columns: int, group: int | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
  """One matrix `[rows, columns]`, quantized and packed by the library."""
  codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
  scale = (0.5 + torch.rand(rows, columns // group if group else 1, generator=generator)).to(torch.bfloat16).float()
  weight = codes * scale.repeat_interleave(group or columns, dim=1)
  strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
  arguments = {"num_bits": bits, "type": "int", "symmetric": True} | strategy
  scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
  compressor = BaseCompressor.get_value_from_registry("pack-quantized")
  made = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
  made["weight_scale"] = made["weight_scale"].to(DTYPES[bits])
  assert torch.equal(compressor.decompress(made, scheme)["weight"].float(), weight.to(DTYPES[bits]).float())
  return made | {"codes": codes.to(torch.int8)}


def main() -> None:
  """Writes the file beside this script."""
  generator, tensors = torch.Generator().manual_seed(0), {}
  for bits in DTYPES:
    for name, sizes in CASES.items():
      made = case(bits, *sizes, generator)
      tensors |= {f"{name}_{bits}.{key}": value.contiguous() for key, value in made.items()}
  versions = {"compressed-tensors": compressed_tensors.__version__, "torch": torch.__version__}
  path = Path(__file__).with_name("compressed.safetensors")
  save_file(tensors, path, metadata={"made_by": json.dumps(versions)})


if __name__ == "__main__":
  main()
