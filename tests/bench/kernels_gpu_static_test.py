"""What is read from the compiler's messages, and which launches are compiled; the compiler itself runs in tests/aot."""

import pytest

from moeq_jax.bench import _gpu_compile, kernels_gpu_static

SAID = """
  wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 ...
  shfl.sync.bfly.b32 ...
  shfl.sync.bfly.b32 ...
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_registers_spills_and_instructions_are_read():
  assert _gpu_compile.read(SAID) == {
    "registers": 168, "spill_stores": 12, "spill_loads": 8, "wgmma": 1, "shuffle": 2}


@pytest.mark.parametrize(("said", "count"), [("", 0), (SAID + SAID, 2)])
def test_no_kernel_and_two_kernels_are_errors(said: str, count: int):
  assert f"{count} kernels" in _gpu_compile.read(said)["error"]


def test_every_distinct_shape_is_compiled_for_few_and_for_many_rows():
  jobs = kernels_gpu_static.cases("mixtral-8x7b,moeq-small")
  assert [(job["layer"], job["rows"]) for job in jobs] == [
    ("mixtral-8x7b", 16), ("mixtral-8x7b", 8192)] * 2 + [("moeq-small", 16), ("moeq-small", 8192)]
  assert {job["projection"] for job in jobs[:4]} == {"up", "down"}


def test_without_the_compiler_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(_gpu_compile, "missing", lambda: "jax-cuda13-plugin is not installed: `./launch.sh aot`")
  with pytest.raises(RuntimeError, match="launch.sh aot"):
    kernels_gpu_static.run()


def test_an_error_of_the_compiler_ends_it(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(_gpu_compile, "missing", lambda: None)
  monkeypatch.setattr(_gpu_compile, "launch", lambda **job: {**job, "error": "no such launch"})
  with pytest.raises(RuntimeError, match="no such launch"):
    kernels_gpu_static.run()


def test_the_table_shows_spills(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
  config = {"rows": 16, "scale": "after"}
  monkeypatch.setattr(_gpu_compile, "missing", lambda: None)
  monkeypatch.setattr(_gpu_compile, "launch", lambda **job: {**job, "config": config, **_gpu_compile.read(SAID)})
  result = kernels_gpu_static.run("moeq-small")
  assert [row["registers"] for row in result["results"]] == [168, 168]
  assert " 20 " in capsys.readouterr().out
