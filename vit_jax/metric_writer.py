"""Metrics as JSON lines, TensorBoard events and lines or a bar on the terminal.

metrics.jsonl is the record: one object a line with `step` and `time`. The
events are made from it, so that both are cut back to the restored step when a
run resumes, and no row stands twice.

Remote folders (gs://) cannot be appended to: there both are written beside, in
a temporary folder, and copied whole by `sync`, at every checkpoint and at the
end. No row that a resumed run needs is newer than its checkpoint.
"""
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import types

from etils import epath
import jax
from rich import console as rich_console
from rich import progress as rich_progress

METRICS = 'metrics.jsonl'
EVENTS = 'events'
CURVES = 'curves.png'
# Early steps that are shown in any case: is the loss moving, how fast is it?
EARLY = (1, 2, 5, 10)
# What stands first on the terminal; the rest follows by name.
SHOWN = ('loss', 'lr', 'grad_norm', 'images_per_s', 'data_wait')


def read(workdir):
  """The rows of metrics.jsonl; a half-written last line is dropped."""
  path = epath.Path(workdir) / METRICS
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def is_remote(path):
  """Whether a path is on no file system of this machine, as gs://bucket."""
  return '://' in str(path)


def say(line):
  """Prints a line, once for all processes; rich puts it above its bar."""
  if jax.process_index() == 0:
    print(line, flush=True)


def attempt(what, action, *args, quiet=False):
  """Calls `action(*args)`; what cannot be written does not stop a run.

  Returns:
    Whether it went well; if not there was a warning, unless `quiet`.
  """
  try:
    action(*args)
    return True
  except OSError as e:
    if not quiet:
      say(f'warning: {what} cannot be written ({e.strerror or e}).\n'
          '  Free some space: training goes on, and rows are not lost.')
    return False


class MetricWriter:
  """Writes rows; of several processes only the first writes anything."""

  def __init__(self, workdir, start_step, total_steps, logger=None):
    """Opens the record of a run that starts after `start_step`.

    Args:
      workdir: the run's folder.
      start_step: rows of later steps, left by a killed run, are removed.
      total_steps: for the progress bar.
      logger: is given every new row, too: `wandb_logger.Logger`.
    """
    self.rows = [r for r in read(workdir) if r['step'] <= start_step]
    self._total_steps = total_steps
    self._active = jax.process_index() == 0
    self._bar = self._file = None
    self._logger = logger
    if not self._active:
      return
    self._remote = epath.Path(workdir) if is_remote(workdir) else None
    self._local = tempfile.mkdtemp() if self._remote else workdir
    self._path = os.path.join(self._local, METRICS)
    self._warned = False
    self._try('metrics.jsonl', self._rewrite)
    self._events = None
    self._try('events', self._open_events, os.path.join(self._local, EVENTS))
    if sys.stderr.isatty():
      self._bar = _Bar(start_step, total_steps)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._active:
      if self._bar:
        self._bar.stop()
      self._try('metrics.jsonl', self._finish)
      if self._events:
        self._try('events', self._events.close)
      if self._remote:
        self._try('metrics.jsonl', self._copy)
        shutil.rmtree(self._local)
      if self._logger:
        self._logger.close()

  def sync(self):
    """Makes the files complete; copies them, where the folder is remote."""
    if not self._active:
      return
    if self._events:
      self._try('events', self._events.flush)
    if self._remote:
      self._try('metrics.jsonl', self._copy)

  def write(self, step, metrics):
    """Records a row: name -> number, after `step` updates."""
    row = {'step': step, 'time': round(time.time(), 3), **metrics}
    self.rows.append(row)
    if self._active:
      self._try('metrics.jsonl', self._append, row)
      if self._events and not self._try('events', self._add_events, row):
        self._events = None
      if self._logger:
        self._logger.log(row)

  def write_train(self, step, metrics, epoch):
    """Records a training row, and shows it on the bar or as a line."""
    metrics = {k: float(metrics[k]) for k in sorted(metrics, key=_place)}
    self.write(step, {f'train/{k}': v for k, v in metrics.items()})
    text = f'epoch {epoch:.2f} ' + ' '.join(
        f'{k} {v:.4g}' for k, v in metrics.items())
    if self._bar:
      self._bar.update(step, text)
    else:
      say(f'step {step}/{self._total_steps} {text}')

  def has(self, step, names):
    """Whether an evaluation row of `step` exists for one of the names."""
    return any(r['step'] == step and any(f'{n}/count' in r for n in names)
               for r in self.rows)

  def last(self, names):
    """The newest row of one of the evaluators, without step and time; {}."""
    for row in reversed(self.rows):
      if any(f'{n}/count' in row for n in names):
        return {k: v for k, v in row.items() if k not in ('step', 'time')}
    return {}

  def _try(self, what, action, *args):
    """`attempt`, with one warning a run."""
    done = attempt(what, action, *args, quiet=self._warned)
    self._warned = self._warned or not done
    return done

  def _rewrite(self):
    with open(self._path + '.tmp', 'w') as f:
      f.writelines(json.dumps(row) + '\n' for row in self.rows)
    os.replace(self._path + '.tmp', self._path)
    self._file = open(self._path, 'a')  # noqa: SIM115 - closed by _finish

  def _append(self, row):
    if not self._file:  # the last write failed, perhaps in mid-line
      return self._rewrite()
    file, self._file = self._file, None
    try:
      file.write(json.dumps(row) + '\n')
      file.flush()
    except OSError:
      with contextlib.suppress(OSError):  # closing tries to write once more
        file.close()
      raise
    self._file = file

  def _finish(self):
    if not self._file:
      self._rewrite()
    self._file.close()

  def _copy(self):
    """Puts the local files into the remote folder."""
    (self._remote / EVENTS).mkdir(parents=True, exist_ok=True)
    events = os.listdir(os.path.join(self._local, EVENTS))
    for name in (METRICS, *(os.path.join(EVENTS, n) for n in events)):
      epath.Path(self._local, name).copy(self._remote / name, overwrite=True)

  def _open_events(self, folder):
    if self._remote and (self._remote / EVENTS).is_dir():
      (self._remote / EVENTS).rmtree()
    self._events = _event_writer(folder)
    for row in self.rows:
      self._add_events(row)

  def _add_events(self, row):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto import summary_pb2
    values = [summary_pb2.Summary.Value(tag=k, simple_value=v)
              for k, v in row.items() if k not in ('step', 'time')]
    self._events.add_event(event_pb2.Event(
        step=row['step'], wall_time=row['time'],
        summary=summary_pb2.Summary(value=values)))


def _place(name):
  return SHOWN.index(name) if name in SHOWN else len(SHOWN), name


class _Bar:
  """A rich progress bar on the terminal's standard error."""

  def __init__(self, start_step, total_steps):
    self._progress = rich_progress.Progress(
        rich_progress.MofNCompleteColumn(), rich_progress.BarColumn(20),
        rich_progress.TextColumn('ETA'), rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn('{task.description}'),
        console=rich_console.Console(stderr=True))
    self._task = self._progress.add_task(
        'compiling', total=total_steps, completed=start_step)
    self._progress.start()

  def update(self, step, text):
    self._progress.update(self._task, completed=step, description=text)

  def stop(self):
    self._progress.stop()


def _event_writer(folder):
  """TensorBoard's own writer, on an emptied folder, without TensorFlow."""
  # Without this name tensorboard.compat imports TensorFlow where it finds it.
  sys.modules.setdefault(
      'tensorboard.compat.notf', types.ModuleType('tensorboard.compat.notf'))
  from tensorboard.summary.writer import event_file_writer
  os.makedirs(folder, exist_ok=True)
  for name in os.listdir(folder):
    if 'tfevents' in name:
      os.remove(os.path.join(folder, name))
  return event_file_writer.EventFileWriter(folder)


def plot_curves(rows, workdir):
  """Draws loss, rate and evaluations against steps into curves.png.

  Args:
    rows: rows of metrics.jsonl.
    workdir: the folder that takes it.
  """
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  logging.getLogger('matplotlib').setLevel(logging.WARNING)

  def curve(axes, name, label=None, **style):
    points = [(r['step'], r[name]) for r in rows if name in r]
    if points:
      axes.plot(*zip(*points, strict=True), label=label or name, **style)

  names = sorted({k for r in rows for k in r})
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
  curve(left, 'train/loss', color='C0', linewidth=1)
  for i, name in enumerate(n for n in names if n.endswith('/loss')):
    if name != 'train/loss':
      curve(left, name, color=f'C{i + 1}', marker='o', markersize=3)
  left.set(xlabel='step', ylabel='loss', title='Loss')
  rate = left.twinx()
  curve(rate, 'train/lr', color='0.7', linestyle='--', linewidth=1)
  rate.set_ylabel('learning rate (dashed)', color='0.5')
  for i, name in enumerate(n for n in names if n.endswith('/top1')):
    points = [(r['step'], 100 * (1 - r[name])) for r in rows if name in r]
    right.plot(*zip(*points, strict=True), marker='o', markersize=3,
               color=f'C{i + 1}', label=f'{name} {100 - points[-1][1]:.2f} %')
  right.set(xlabel='step', ylabel='top-1 error (%)', yscale='log',
            title='Evaluation')
  for axes in (left, right):
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=8, frameon=False)
  figure.tight_layout()
  png = io.BytesIO()
  figure.savefig(png, dpi=120)
  attempt(CURVES, epath.Path(workdir, CURVES).write_bytes, png.getvalue())
  plt.close(figure)
