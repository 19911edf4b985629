"""Weights & Biases, when asked for: a mirror of metrics.jsonl.

Nothing of it is imported where `wandb.project` is '', and nothing that goes
wrong in it stops a run: the record is metrics.jsonl.
"""
import logging
import os
import secrets

from vit_jax import choices

MODES = ('online', 'offline')
RUN_ID = 'wandb_id.txt'


class Logger:
  """Sends rows to one run of W&B, which a resumed run continues."""

  def __init__(self, config, workdir, resolved):
    """Imports and starts nothing yet: the first row does.

    Args:
      config: `project` ('': off) and `mode`, one of MODES; offline writes to
        <workdir>/wandb, for `wandb sync`.
      workdir: the run's folder; its name is the run's.
      resolved: the run's config as nested dicts.

    Raises:
      ValueError: an unknown mode.
    """
    self._project, self._mode = config['project'], config['mode']
    if self._mode not in MODES:
      raise ValueError(choices.unknown(self._mode, MODES, 'wandb.mode'))
    self._workdir, self._resolved = workdir, resolved
    self._on, self._run = bool(self._project), None

  def log(self, row):
    """Sends a row of metrics.jsonl."""
    if self._on:
      self._try(self._log, row)

  def close(self):
    """Waits until W&B has what it was sent."""
    if self._on and self._run:
      self._try(self._run.finish)

  def _log(self, row):
    self._run = self._run or self._start()
    metrics = {k: v for k, v in row.items() if k not in ('step', 'time')}
    self._run.log(metrics, step=row['step'])

  def _start(self):
    import wandb
    path = os.path.join(self._workdir, RUN_ID)
    try:
      with open(path) as f:
        run_id = f.read().strip()
    except FileNotFoundError:
      run_id = secrets.token_hex(4)
      with open(path, 'w') as f:
        f.write(run_id + '\n')
    return wandb.init(
        project=self._project, mode=self._mode, id=run_id, resume='allow',
        dir=self._workdir, config=self._resolved,
        name=os.path.basename(os.path.abspath(self._workdir)))

  def _try(self, action, *args):
    """Calls `action`; a failure is one warning, and the end of W&B."""
    try:
      action(*args)
    except Exception as e:
      self._on = False
      hint = ('pip install wandb' if isinstance(e, ImportError)
              else 'wandb login, or --config.wandb.mode=offline')
      logging.warning(
          'warning: W&B is off, and training goes on (%s: %s).\n  %s',
          type(e).__name__, str(e).strip().split('\n')[0], hint)
