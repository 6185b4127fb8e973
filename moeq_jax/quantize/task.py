"""The task `quantize`: the order of the sweeps.

Each sweep goes through the layers one by one; what it makes of a layer is kept under a key, so a run that was killed
goes on behind the last finished layer and ends with the bytes of an undisturbed one.
"""

import dataclasses
import shutil
from pathlib import Path

import ml_collections
from rich import console as rich_console

from moeq_jax import artifacts, channels, codecs, report, scores, user_text, workspace
from moeq_jax.allocate import methods
from moeq_jax.export import native
from moeq_jax.quantize import blocks, dry_run, encode, evaluation, exports, initial, measure, planning, room
from moeq_jax.quantize import settings, summary
from moeq_jax.quantize import needs as needs_lib
from moeq_jax.quantize import states as states_lib
from moeq_jax.quantize import subject as subject_lib
from moeq_jax.quantize.subject import Subject
from moeq_jax.scores import channels as channel_scores


@dataclasses.dataclass(frozen=True)
class Opened:
  """What a run has before its first sweep.

  Attributes:
    subject: the checkpoint.
    codec: the codec.
    budget: average nominal bits per expert weight.
    needs: the sweeps that the plan needs.
    calibration, evaluation: text, where it is needed.
  """

  subject: Subject
  codec: codecs.Codec
  budget: float
  needs: needs_lib.Needs
  calibration: user_text.Text | None
  evaluation: user_text.Text | None


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Quantizes one checkpoint to `workdir/quantized`, and writes the report.

  Args:
    config: see `configs/quantize.py`.
    workdir: where everything goes.

  Raises:
    ValueError: a mistake in the config or the checkpoint; names field, file or tensor and the remedy.
    OSError: too little room on the disk.
  """
  config = blocks.resolved(config)
  if config.dry_run:
    dry_run.run(config, workdir)
    return
  settings.check(config)
  run = workspace.Workdir(workdir)
  with run.timed("open"):
    config, opened = open_run(config, run)
    states = calibration_states(opened, config)
  with run.timed("measure"):
    found = gather(opened, config, states)
  with run.timed("plan"):
    ask = opened.subject, config.method, found, plan_inputs(opened, config, found)
    chosen = planning.plan(*ask, opened.budget, config.seed)
    room.check_plan(config, opened.subject, chosen.plan, opened.budget)
    exports.check_plan(config.export, chosen.plan.bits)
    constraints = planning.constraint_costs(*ask, chosen.plan)
  with run.timed("encode"):
    job = encode.Job.of(opened.codec, chosen.plan, opened.subject.source.projections, config.sequential)
    metas = encode.encode(opened.subject, job, opened.calibration, states)
    model = finish(opened, config, chosen.plan, metas)
  with run.timed("evaluate"):
    losses = evaluate(opened, job, metas)
  with run.timed("export"):
    copies = exports.export(opened.subject, model, config.export)
  with run.timed("report"):
    summary.write(config, summary.Outcome(opened, found, chosen, constraints, model, metas, losses, copies))
    page = report.write(workdir)
  shutil.rmtree(run.path / "states", ignore_errors=True)
  summary.terminal(run.path, page, rich_console.Console())


def open_run(config: ml_collections.ConfigDict, run: workspace.Workdir) -> tuple[ml_collections.ConfigDict, Opened]:
  """Opens the checkpoint and reads the text; looks whether the bits and the disk suffice. The config comes back with
  the method that is run, see `initial.resolved`."""
  codec = codecs.get(config.codec)
  subject = subject_lib.open_source(run, config.checkpoint, config.compute_dtype)
  source, directory = subject.source, subject.source.directory
  config = initial.resolved(config, source)
  blocks.check_source(config.method, codec, measure.projection_shapes(subject))
  budget = room.budget(config, subject, codec.group)
  needs = needs_lib.of(config.method, budget, tuple(config.widths), codec, source.projections,
                       initial.known(config, source), text=bool(config.calibration.sequences))
  read = lambda purpose: user_text.read(purpose, config, directory, source.config, source.values)
  if needs.text and not config.calibration.sequences:
    raise ValueError(f"config.calibration.sequences=0: {config.method} with {config.codec} needs text; ask for some, or"
                     f" quantize {user_text.DATA_FREE}")
  calibration = read("calibration") if needs.text else None
  evaluation_text = read("evaluation") if config.evaluation.sequences else None
  disk = room.disk_needed(subject, config, needs, budget, codec.group, calibration, evaluation_text)
  room.check_disk(run.path, disk)
  exports.check_source(config.export, subject, codec.group)
  opened = Opened(subject, codec, budget, needs, calibration, evaluation_text)
  print(summary.outlook(opened, disk, evaluation_text is not None), flush=True)
  return config, opened


def calibration_states(opened: Opened, config: ml_collections.ConfigDict) -> states_lib.States | None:
  """What flows through the full-precision model; every place is kept where a later sweep reads it again."""
  if opened.calibration is None:
    return None
  needs = opened.needs
  again = needs.backward or needs.fisher or (needs.rows and not config.sequential)
  return measure.text_states(opened.subject, opened.calibration, "calibration", keep=needs.forward and again)


def gather(opened: Opened, config: ml_collections.ConfigDict,
           states: states_lib.States | None) -> scores.Evidence | channel_scores.Evidence:
  """The sweeps before the plan, those that it needs; what they measured, neuron by neuron for blocks of them."""
  subject, needs, text = opened.subject, opened.needs, opened.calibration
  encoding = measure.Encoding(opened.codec, tuple(config.widths), neurons=bool(methods.block_of(config.method)))
  seen, gradients, errors = {}, None, {}
  if needs.forward:
    seen = errors = measure.forward(subject, text, states, encoding if needs.fused else None)
  if needs.backward:
    gradients = measure.backward(subject, text, states)
  if needs.errors and not needs.fused:
    use = (text, states, gradients) if needs.fisher else (None, None, None)
    errors = measure.errors(subject, *use, encoding)
  routers = planning.routers(subject)
  stats = measure.stats(subject, text, seen, gradients, routers)
  if encoding.neurons:
    return blocks.evidence(subject, stats, errors, encoding)
  before = initial.load(config, subject.source, routers.shape)
  return planning.evidence(subject, stats, measure.error_table(subject, errors, encoding), routers, before)


def plan_inputs(opened: Opened, config: ml_collections.ConfigDict,
                found: scores.Evidence | channel_scores.Evidence) -> dict[str, str]:
  """Digests of all that the evidence was made from, beside the checkpoint."""
  before = getattr(found, "routers_init", None)
  return {
      "text": opened.calibration.digest if opened.calibration else "",
      "errors": artifacts.digest([str(opened.codec), list(config.widths), opened.subject.dtype]),
      "routers": artifacts.digest(before) if before is not None else "",
  }


def finish(opened: Opened, config: ml_collections.ConfigDict, plan: artifacts.Plan | channels.BlockPlan,
           metas: dict[int, dict]) -> native.Quantized:
  """Completes the quantized model, whose layers are written.

  Raises:
    ValueError: its files do not fit into `config.memory`.
  """
  manifest = {"codec": str(opened.codec), "plan": plan.as_json(), "source": opened.subject.digest,
              "sequential": config.sequential}
  model = encode.finish(opened.subject, metas, manifest)
  taken = sum(path.stat().st_size for path in model.directory.iterdir())
  if config.memory and taken > room.parse_bytes(config.memory):
    raise ValueError(f"{model.directory}: takes {room.human(taken)}, more than config.memory={config.memory}")
  return model


def evaluate(opened: Opened, job: encode.Job, metas: dict[int, dict]) -> evaluation.Losses | None:
  """Losses before and after, if text for it was asked for."""
  if opened.evaluation is None:
    return None
  subject, text = opened.subject, opened.evaluation
  full = evaluation.full_precision(subject, text)
  return evaluation.Losses(full, evaluation.quantized(subject, job, text, metas), text.tokens)
