"""Every leaf of every config has an effect, which is named here.

A leaf without a row in `EFFECTS` fails: say what it changes when you add one.
The observed things, each a function of the config alone:
  step      the traced training step, with its constants
  init      the traced initialisation, its shapes, key and loaded weights
  inputs    the numbers that the step is given with each batch
  schedule  the rates of the run's first, last and some other steps
  batches   the first rows of the training and the evaluation batches
  data      what the source is asked for, and the class names
and at run time
  log eval checkpoint   the steps at which these are due
  estimate  the batches on which BatchNorm's statistics are estimated
  keep      which checkpoints stay
  prefetch  the batches ahead
  cache     JAX's folder of compiled programs
  logger    what W&B is told
  refused   the alternative is an error, which names the key: a check, or a
            choice of one
"""
import contextlib
import functools
import hashlib
import inspect
import io
import json
import re
import types

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

import input_pipeline
from input_pipeline import sources
from tests import test_config
from vit_jax import config as config_lib
from vit_jax import durations
from vit_jax import models
from vit_jax import precise_bn
from vit_jax import recipes
from vit_jax import schedules
from vit_jax import sharding
from vit_jax import train
from vit_jax.pretrained import files
from vit_jax.pretrained import writers

SOME_PATHS = ('stem/projection/.*',)
SIZED = {'input.pp': 'decode|resize(32)',
         'input.eval_pp': 'decode|resize(32)'}
TFDS = {'input.source': 'tfds', 'input.path': 'a_name', **SIZED}
VIT_P = {'model.stem': 'patchify', 'model.pool': 'token'}
CONV = {'model.stem': 'conv'}
PYCLS = dict(name='pycls', alpha=1e-5, every_steps=32)
# leaf: (what it changes, another value or {present value: another}, with ... as
# the default), then changes that both arms have.
# A key of several parts in the last dict, or a dict, replaces a section.
EFFECTS = {
    'seed': ('init', 1),
    'data_seed': ('batches', 7),
    'total_epochs': ('schedule', {300.0: 200.0, ...: 30.0}),
    'total_steps': ('schedule', 700),
    'global_batch_size': ('batches', {4096: 2048, ...: 4096}),
    'input.source': ('data', 'arrays', SIZED),
    'input.path': ('data', '/elsewhere', {'input.source': 'arrays', **SIZED}),
    'input.classes': ('data', 'CLASSES'),
    'input.holdout': ('data', 0.2, {'input.source': 'arrays', **SIZED}),
    'input.validation': ('batches', 0.5),
    'input.channels': ('batches', 1,
                       {'input.mean': (0.5,), 'input.std': (0.5,),
                        'augment': ''}),
    'input.epoch': ('schedule', {'exact': 'floor', 'floor': 'exact'},
                    {'schedule.per': 'epoch'}),
    'input.repeats': ('batches', 3),
    'input.pp': ('batches', 'decode|resize(32)|flip_lr', SIZED),
    'input.eval_pp': ('batches', 'decode|central_crop(16)|resize(32)', SIZED),
    'input.only_classes': ('data', ('3', '1')),
    'input.per_class': ('batches', 20),
    'input.max_bad_fraction': ('data', 0.5),
    'input.data_dir': ('data', '/elsewhere', TFDS),
    'input.train_split': ('data', 'train[:90%]', TFDS),
    'input.eval_split': ('data', 'test', TFDS),
    'input.stream': ('data', True, TFDS),
    'input.window': ('data', 64, TFDS),
    'input.mean': ('step', (0.4,)),
    'input.std': ('step', (0.4,)),
    'input.num_train': ('refused', 5),
    'input.num_classes': ('refused', 5),
    'augment': ('step', 'randaug(2, 10)|mixup(0.2)'),
    'augment_driver': ('step', 'batched', {'augment': 'randaug(2, 10)'}),
    'augment_on': ('step', 'host', {'augment': 'randaug(2, 10)'}),
    'model.size': ('init', {
        'Mixer-micro': 'Mixer-S/16', 'BiT-micro': 'BiT-R50x1', ...: 'S/16'}),
    'model.stem': ('init', {'patchify': 'conv', ...: 'patchify'}),
    'optimizer.momentum_dtype': ('init', 'bfloat16'),
    'model.pool': ('init', {'gap': 'token', 'token': 'gap'}),
    'model.pre_logits': ('init', True),
    'model.pos_embedding': ('init', 'sincos2d'),
    'model.gelu': ('step', {'erf': 'tanh', 'tanh': 'erf'}),
    'model.norm_eps': ('step', 1e-5),
    'model.init': ('init', 'big_vision'),
    'model.head_bias': ('init', -10.0),
    'model.dropout': ('step', {0.1: 0.2, ...: 0.1}),
    'model.stochastic_depth': ('step', {0.1: 0.2, ...: 0.1}),
    'model.batch_norm': ('step', 'frozen', CONV),
    'model.batch_norm_group': ('step', 32, CONV),
    'model.conv': ('step', 'im2col'),
    'model.attention': ('step', 'pallas'),
    'model.dtype': ('step', 'bfloat16'),
    'model.scan': ('init', {False: True, True: False}),
    'model.remat': ('step', 'full'),
    'loss.name': ('step', {
        'sigmoid_xent': 'softmax_xent', ...: 'sigmoid_xent'}),
    'loss.label_smoothing': ('step', {0.0: 0.1, ...: 0.0}),
    'optimizer.name': ('step', 'SECTION'),
    'optimizer.lr': ('schedule', 3e-4),
    'optimizer.weight_decay': ('inputs', 0.3),
    'optimizer.b1': ('step', 0.8),
    'optimizer.b2': ('step', 0.95),
    'optimizer.eps': ('step', 1e-7),
    'optimizer.momentum': ('step', 0.8),
    'optimizer.nesterov': ('step', {True: False, False: True}),
    'optimizer.clip_norm': ('step', {1.0: 2.0, ...: 1.0}),
    'optimizer.layer_decay': ('step', 0.75),
    'optimizer.decay': ('step', ('.*',)),
    'schedule.name': ('schedule', {'staircase': 'constant', ...: 'linear'}),
    'schedule.warmup_epochs': ('schedule', 1.0),
    'schedule.warmup_steps': ('schedule', {10_000: 1000, ...: 50}),
    'schedule.warmup_start': ('schedule', 0.3),
    'schedule.cooldown_epochs': ('schedule', 20.0),
    'schedule.cooldown_steps': ('schedule', 50),
    'schedule.final': ('schedule', 0.1),
    'schedule.drops': ('schedule', (0.3, 0.6)),
    'schedule.drop_factor': ('schedule', 0.2),
    'schedule.per': ('schedule', {'step': 'epoch', 'epoch': 'step'}),
    'schedule.progress': ('schedule', {'after_warmup': 'from_start',
                                       'from_start': 'after_warmup'}),
    'ema.name': ('step', 'SECTION'),
    'ema.decay': ('step', 0.9),
    'ema.alpha': ('step', 2e-5),
    'ema.every_steps': ('step', 16),
    'precise_bn.examples': ('estimate', 4096, CONV),
    'frozen': ('init', SOME_PATHS, CONV),
    'init_from.run': ('init', 'FINISHED'),
    'init_from.weights': (
        'init', 'raw', {'init_from.run': 'FINISHED'}),
    'init_from.checkpoint': ('init', 'RELEASED', VIT_P),
    'init_from.resize': (
        'init', 'antialias', {**VIT_P, 'init_from.checkpoint': 'RELEASED'}),
    'init_from.channels': (
        'init', 'bgr', {**VIT_P, 'init_from.checkpoint': 'RELEASED'}),
    'init_from.paths': (
        'init', SOME_PATHS, {'init_from.run': 'FINISHED'}),
    'init_from.reset': (
        'init', SOME_PATHS, {'init_from.run': 'FINISHED'}),
    'mesh.data': ('refused', 3),
    'mesh.fsdp': ('refused', 3),
    'mesh.tensor': ('refused', 3),
    'accumulation_steps': ('refused', 3),
    'prefetch': ('prefetch', 3),
    'log.every_steps': ('log', 30),
    'eval.every_epochs': ('eval', {10.0: 1.0, ...: 2.0}),
    'eval.every_percent': ('eval', 25.0),
    'eval.batch_size': ('batches', 64),
    'evaluators.test.name': ('refused', 'regression'),
    'evaluators.test.split': ('refused', 'val'),
    'evaluators.val.name': ('refused', 'regression'),
    'evaluators.val.split': ('batches', 'test'),
    'evaluators.minival.name': ('refused', 'regression'),
    'evaluators.minival.split': ('batches', 'test'),
    'checkpoint.every_epochs': ('checkpoint', {10.0: 1.0, ...: 2.0}),
    'checkpoint.every_percent': ('checkpoint', {25.0: 50.0, ...: 25.0}),
    'checkpoint.keep_last': ('keep', 3),
    'checkpoint.keep_best': ('keep', ''),
    'compilation_cache': ('cache', ''),
    'wandb.project': ('logger', 'vit'),
    'wandb.mode': ('logger', 'offline', {'wandb.project': 'vit'}),
}
SECTIONS = {
    'optimizer.name': {'adamw': recipes.sgd(1.0, 1e-4),
                       'sgd': recipes.adamw(1e-3, 0.1)},
    'ema.name': {'none': PYCLS, 'decay': PYCLS,
                 'pycls': dict(name='decay', decay=0.99)},
}
CONFIGS = {
    # Scanned: traced in a fraction of the time.
    'digits': ('digits.py', None, {'model.scan': True}),
    'digits_sgd': ('digits.py', 'stem=patchify_bn,optimizer=sgd',
                   {'model.scan': True}),
    'vit_c_i1k': ('vit_c_i1k.py', None, {'model.scan': True}),
    'vit_c_i21k': ('vit_c_i21k.py', None, {'model.scan': True}),
    'augreg': ('augreg.py', None, {'model.scan': True}),
    'augreg_tfds': ('augreg.py', 'data=tfds:a_name', {'model.scan': True}),
    'from_scratch_small': ('from_scratch_small.py', None, {'model.scan': True}),
    'finetune': ('finetune.py', None, {
        'model.scan': True, 'total_steps': 60_000}),
    'finetune_bit': ('finetune.py', 'rule=bit,n=1000', {'model.scan': True}),
    'mixer': ('digits.py', None, {
        'model': recipes.mixer('Mixer-micro'), 'model.scan': True}),
    'bit': ('digits.py', None, {'model': recipes.bit('BiT-micro')}),
}


class Reached(BaseException):
  """What was asked for has been seen."""


class Noise(sources.Source):
  """N encoded images, of which ten differ: any size of data in few bytes."""
  encoded = True

  def __init__(self, count, first=0, classes=1000):
    super().__init__(np.arange(count) % classes, map(str, range(classes)))
    self._first = first

  def read(self, indices):
    return [_image(int(i + self._first) % 10) for i in indices]


@functools.cache
def _image(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, 'png')
  return stream.getvalue()


def build(name, changes, tmp_path, request):
  """A config with {dotted path: value}."""
  file, args, always = CONFIGS[name]
  c = test_config.load(f'{test_config.ROOT}/configs/{file}', args)
  c.compilation_cache = str(tmp_path / 'xla')
  for path, value in (*always.items(), *changes.items()):
    if value == 'CLASSES':
      count = 10 if file == 'digits.py' else 1000
      value = str(tmp_path / 'classes.json')
      with open(value, 'w') as f:
        json.dump([f'class {i}' for i in range(count)], f)
    elif value == 'FINISHED':
      value = request.getfixturevalue('finished')[0]
    elif value == 'RELEASED':
      value = released(c, tmp_path)
    *parents, leaf = path.split('.')
    section = c
    for parent in parents:
      section = section[parent]
    if isinstance(value, ConfigDict):
      value = value.copy_and_resolve_references()
    if value == 'SECTION':
      c[parents[0]] = ConfigDict(SECTIONS[path][section[leaf]])
    else:
      if isinstance(value, dict):
        value = value.get(section[leaf], value.get(...))
      section[leaf] = value
  return c


def released(config, tmp_path):
  """A file of weights in timm's names, for images of twice the size."""
  model = models.create(
      num_classes=10, **train.train_state.model_fields(config.model, ()))
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), jax.eval_shape(
          lambda key, x: model.init(key, x, train=False), jax.random.key(0),
          images)['params'])
  path = str(tmp_path / 'released.safetensors')
  files.write_safetensors(path, writers.arrays(params, 'timm'))
  return path


def observe(config, what, tmp_path, monkeypatch):
  """Starts the real program; returns one of the things in the docstring."""
  seen, opened = {}, []

  def watch(owner, name, look, stop_for=(), call=True):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
      result = real(*args, **kwargs) if call else None
      replaced = look(result, *args, **kwargs)
      if what in stop_for:
        raise Reached
      return result if replaced is None else replaced
    patch.setattr(owner, name, wrapped)

  def cadence(due, section, units, total_steps):
    part = ('log', 'eval', 'checkpoint')[len(opened)]
    opened.append(part)
    seen[part] = [s for s in range(1, min(total_steps, 20_000)) if due(s)]
    if part == what:
      raise Reached

  def schedule(value, section, units, total_steps):
    steps = np.concatenate([np.linspace(0, total_steps, 30),
                            np.geomspace(1, total_steps, 30),
                            [total_steps - 1]]).astype(int)
    seen['schedule'] = total_steps, [
        float(value(s)) * config.optimizer.lr for s in steps]

  def evals(_, section, predict, data, mesh, batch_size, estimate):
    parts = {name: digest(next(input_pipeline.eval_batches(
        data, section[name].split, global_batch_size=batch_size,
        process_count=batch_size // 8))) for name in section}
    first = digest(next(seen['train_batches'](
        process_count=config.global_batch_size // 8)))
    seen['batches'] = (batch_size, config.global_batch_size, parts, first)

  def open_data(data, section, data_seed, **_):
    seen['data'] = (
        seen.get('asked'), data.class_names, data.bad._max_fraction)

  def estimate(function, section, model, variables, normalize, train_batches,
               *_):
    seen['train_batches'] = train_batches
    seen['estimate'] = inspect.getclosurevars(function).nonlocals.get(
        'num_batches')

  def init(result, model, image_shape, make_tx, frozen, with_ema, mesh):
    if what == 'init':
      variables = train.train_state._init_variables(model, image_shape)
      with sharding.tracing(mesh):
        seen['init'] = [jaxpr(
            lambda key: train.train_state.create(
                variables(key), make_tx, frozen, with_ema), jax.random.key(0))]
    return (lambda key: None), result[1] if result else ()

  def step(_, run):
    if what == 'step':
      with sharding.tracing(run.mesh):
        seen['step'] = jaxpr(run.step, *run.abstract_args)
    seen['inputs'] = float(run.hypers['weight_decay'])
    if what == 'init':
      seen['init'].append(jax.random.key_data(run.hypers['key']).tolist())

  def with_variables(_, state, given):
    if 'init' in seen:
      seen['init'].append(digest(given))
    return types.SimpleNamespace(step=0)

  def reader(real):
    def read(path, holdout, classes, **options):
      seen['asked'] = real, path, holdout, options
      if real == 'digits':
        return sources.digits(path, holdout, classes)
      count = 4000 if real == 'arrays' else 1_281_167
      held = int(count * holdout)
      return sources.Splits(
          renamed(Noise(count), classes),
          {part: renamed(Noise(held // n, first=first), classes)
           for n, (part, first) in enumerate(
               (('val', 0), ('test', 5), ('minival', 3)), 1)})
    return read

  with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
    for source in sources.SOURCES:
      patch.setitem(sources.SOURCES, source, reader(source))
    watch(input_pipeline, 'open_data', open_data, ['data'])
    watch(durations, 'cadence', cadence)
    patch.setattr(train.train_state, 'abstract_variables',
                  abstract_variables)
    watch(schedules, 'create', schedule, ['schedule'])
    watch(train.evaluators, 'create', evals if what == 'batches' else
          lambda *_: None, ['batches'])
    watch(precise_bn, 'create', estimate, ['estimate'])
    watch(train.train_state, 'init', init, call=what == 'step')
    patch.setattr(train.checkpoint, 'restore', lambda *_: None)
    watch(train.checkpoint, 'Manager', lambda _, folder, *policy: seen.update(
        keep=policy), ['keep'], call=False)
    watch(train.train_state, 'with_variables', with_variables, call=False)
    watch(train.wandb_logger, 'Logger', lambda logger, *_: seen.update(
        logger=(logger._project, logger._mode, logger._on)), ['logger'])
    patch.setattr(train.metric_writer, 'MetricWriter', lambda *_: None)
    watch(train.experiment.Experiment, 'compile_step', step,
          ['step', 'init', 'inputs'], call=False)
    watch(input_pipeline.to_device, 'prefetch', lambda _, batches, s, size:
          seen.update(prefetch=size), ['prefetch'], call=False)
    old = jax.config.jax_compilation_cache_dir
    stack.callback(jax.config.update, 'jax_compilation_cache_dir', old)
    jax.config.update('jax_compilation_cache_dir', None)
    watch(train.devices, 'enable_compilation_cache', lambda *_: seen.update(
        cache=jax.config.jax_compilation_cache_dir), ['cache'])
    with contextlib.suppress(Reached):
      train.train_and_evaluate(config, str(tmp_path / 'run'))
  return seen[what]


@functools.cache
def abstract_variables(model, image_shape, mesh):
  return REAL_VARIABLES(model, image_shape, mesh)


REAL_VARIABLES = train.train_state.abstract_variables


def renamed(source, classes):
  source.class_names = tuple(classes) or source.class_names
  return source


def digest(tree):
  """A hash of arrays; and of their paths."""
  md5 = hashlib.md5()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    md5.update(f'{path} {leaf.shape} {leaf.dtype}'.encode())
    md5.update(np.ascontiguousarray(leaf).tobytes())
  return md5.hexdigest()


def jaxpr(function, *args):
  """A traced program as text, with its constants, without addresses."""
  closed = jax.make_jaxpr(function)(*args)
  return re.sub('0x[0-9a-f]+', '', str(closed)) + digest(closed.consts)


UNCHANGED = {}  # {(config, what is observed, given): what was observed}


def leaves():
  """(config, leaf); what digits has shown before is slow to show again."""
  shown = set()
  for name, (file, args, always) in CONFIGS.items():
    c = test_config.load(f'{test_config.ROOT}/configs/{file}', args)
    c.model = always.get('model', c.model)
    part = {'digits_sgd': 'optimizer.', 'augreg_tfds': 'evaluators.',
            'mixer': 'model.', 'bit': 'model.', 'finetune_bit': 'schedule.'}
    for path in sorted(config_lib.flatten(c.to_dict())):
      if path.startswith(part.get(name, '')):
        marks = [pytest.mark.slow] if path in shown else []
        yield pytest.param(name, path, marks=marks)
        shown.add(path)


def test_an_unchanged_config_is_observed_equal_twice(
    tmp_path, request, monkeypatch):
  for what in sorted({row[0] for row in EFFECTS.values()} - {'refused'}):
    first, second = (
        observe(build('digits', {}, tmp_path, request), what, tmp_path,
                monkeypatch) for _ in range(2))
    assert first == second, what


@pytest.mark.parametrize('name, path', leaves())
def test_every_leaf_has_an_effect(name, path, tmp_path, request, monkeypatch):
  assert path in EFFECTS, 'say here what the key changes'
  what, value, given = (*EFFECTS[path], {})[:3]
  if CONFIGS[name][0] != 'digits.py' and {'FINISHED', 'RELEASED'} & {
      str(v) for v in (value, *given.values())}:
    return  # the same code as in digits, and there are no such weights
  changed = build(name, {**given, path: value}, tmp_path, request)
  if what == 'refused':
    with pytest.raises(ValueError, match=path.rpartition('.')[2] + '|' + (
        str(value))):
      observe(changed, 'step', tmp_path, monkeypatch)
    return
  key = name, what, str(given)
  if key not in UNCHANGED or what == 'cache':  # whose folder is this test's
    base = build(name, given, tmp_path, request)
    UNCHANGED[key] = observe(base, what, tmp_path, monkeypatch)
  assert observe(changed, what, tmp_path, monkeypatch) != UNCHANGED[key]
