"""A trained model as one file: weights, and all that using them takes.

A run's workdir ends with `model.safetensors`; `load` needs nothing beside it:

  model = model_file.load('runs/digits')
  model.predict(model.preprocess(['photo.jpg']))  # probabilities [1, C]

Tensors are float32, `params/<path>` and `batch_stats/<path>` in our own names;
blocks are stacked where the model was trained so. The header's metadata, texts
in JSON, are
  vit_jax        version of this format
  model          what `models.create` takes, num_classes included
  class_names    in the order of the logits
  preprocessing  eval_pp, mean, std, channels, image_shape: see `input_pipeline`
  facts          of the training: config, step, metrics, versions, ...
"""
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import tempfile

from etils import epath
import jax
from jax import numpy as jnp
import numpy as np

import input_pipeline
from input_pipeline import ops as ops_lib
from input_pipeline import pipeline
from vit_jax import metric_writer
from vit_jax import models
from vit_jax import param_paths
from vit_jax import sharding
from vit_jax import train_state
from vit_jax import train_step
from vit_jax import workdir as workdir_lib
from vit_jax.pretrained import files

NAME = 'model.safetensors'
VERSION = 1
BATCH_SIZE = 32
_KINDS = ('params', 'batch_stats')


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that can be used: on pixels, with names for its answers.

  Attributes:
    config: what `models.create` takes, such as a config's section `model`;
      num_classes is added.
    variables: {'params', 'batch_stats'}: nested dicts of arrays.
    class_names: in the order of the logits.
    preprocessing: {'eval_pp', 'mean', 'std', 'channels', 'image_shape'}.
    facts: {name: anything that JSON has}, of the training.

  Raises:
    ValueError: these do not go together.
  """
  config: dict
  variables: dict
  class_names: tuple[str, ...]
  preprocessing: dict
  facts: dict

  def __post_init__(self):
    names = tuple(self.class_names)
    object.__setattr__(self, 'class_names', names)
    object.__setattr__(
        self, 'config', {**self.config, 'num_classes': len(names)})
    if not names or len(set(names)) < len(names) or not all(
        isinstance(n, str) for n in names):
      raise ValueError(f'{len(names)} class names are {len(set(names))} '
                       'different ones.\nGive each class a name of its own.')
    shape = tuple(self.preprocessing['image_shape'])
    size = ops_lib.out_size(self._ops, None, None)
    if shape != (*size, self.preprocessing['channels']):
      raise ValueError(
          f'The preprocessing makes images of {size}, and image_shape is '
          f'{shape}.\nLet eval_pp end in a resize or a crop to that size.')
    _check_variables(self)

  @functools.cached_property
  def module(self):
    """The linen module, with its dtype for this machine."""
    return create_module(self.config)

  @property
  def image_shape(self):
    """(H, W, C) of the images that the model takes."""
    return tuple(self.preprocessing['image_shape'])

  @functools.cached_property
  def apply(self):
    """Returns `apply(variables, uint8 [B, H, W, C]) -> logits [B, C]`."""
    return train_step.make_predict(self.module, self.normalize)

  @functools.cached_property
  def normalize(self):
    """See `train_step.normalizer`."""
    return train_step.normalizer(
        self.preprocessing['mean'], self.preprocessing['std'],
        self.image_shape[-1])

  def preprocess(self, images):
    """Makes of any images what the model takes.

    Args:
      images: paths, bytes of image files, Pillow images, or uint8 arrays
        [H, W] or [H, W, 1 or 3].

    Returns:
      uint8 [N, H, W, C].

    Raises:
      ValueError: one cannot be read; the message has its path.
    """
    with concurrent.futures.ThreadPoolExecutor(pipeline.cpu_count()) as pool:
      found = list(pool.map(self.preprocess_one, images))
    return np.stack(found) if found else np.zeros(
        (0, *self.image_shape), np.uint8)

  def preprocess_one(self, image):
    """`preprocess` of one image: uint8 [H, W, C]."""
    name = 'an image'
    try:
      if isinstance(image, (str, os.PathLike)):
        name, image = str(image), epath.Path(image).read_bytes()
      return input_pipeline.preprocess(
          image, self._ops, self.image_shape[-1])
    except pipeline.READ_ERRORS as e:
      reason = (getattr(e, 'strerror', None) or str(e)).split('\n')[0]
      raise ValueError(f'{name} cannot be read: {reason.rstrip(".")}.\n'
                       'Repair it, or leave it out.') from None

  def logits(self, images, batch_size=BATCH_SIZE):
    """Returns float32 [N, C] for uint8 [N, H, W, C]; see `predict`."""
    return self._run(images, batch_size)[0]

  def predict(self, images, batch_size=BATCH_SIZE):
    """Returns probabilities.

    Compiled once for a batch size, whatever N is: the last batch is padded.

    Args:
      images: uint8 [N, H, W, C], from `preprocess`.
      batch_size: how many are computed at once.

    Returns:
      float32 [N, C]: softmax of the logits, or, where the model was trained
      with sigmoid_xent, the sigmoid of each.

    Raises:
      ValueError: images of another shape or type.
    """
    return self._run(images, batch_size)[1]

  def describe_preprocessing(self):
    """One line: what becomes of an image, and then of its pixels x."""
    line, mean, std = (
        self.preprocessing[key] for key in ('eval_pp', 'mean', 'std'))
    return f'{line}, then (x/255 - {mean}) / {std}'

  @functools.cached_property
  def num_parameters(self):
    """Numbers in `params`."""
    return param_paths.size(self.variables['params'])

  @functools.cached_property
  def _ops(self):
    return input_pipeline.parse_eval_pp(self.preprocessing['eval_pp'])

  @functools.cached_property
  def _on_device(self):
    return jax.device_put(self.variables)

  def forward(self, variables, images):
    """(logits, probabilities) of uint8 [B, H, W, C]; traceable."""
    logits = self.apply(variables, images)
    loss = self.facts.get('config', {}).get('loss', {}).get('name')
    squash = jax.nn.sigmoid if loss == 'sigmoid_xent' else jax.nn.softmax
    return logits, squash(logits)

  @functools.cached_property
  def _forward(self):
    return jax.jit(self.forward)

  def _run(self, images, batch_size):
    return in_batches(lambda batch: self._forward(self._on_device, batch),
                      self.check_images(images), batch_size)

  def check_images(self, images):
    """Returns images as an array; ValueError for what `predict` rejects."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
      raise ValueError(
          f'The images are {images.dtype} {images.shape}, and the model takes '
          f'uint8 {("N", *self.image_shape)}.\nLet model.preprocess make them.')
    return images


def create_module(config):
  """The linen module of a `Model`'s config; ValueError for a wrong one."""
  fields = {'dtype': 'auto', **config}
  num_classes = fields.pop('num_classes')
  return models.create(
      num_classes=num_classes, **train_state.model_fields(fields, ()))


def in_batches(function, images, batch_size):
  """Applies a jitted function to N images in batches of one size.

  Args:
    function: of [batch_size, ...]; returns a tree of arrays [batch_size, ...].
    images: array [N, ...]; the last batch is padded with zeros.
    batch_size: at least 1.

  Returns:
    The tree, of numpy arrays [N, ...].
  """
  if batch_size < 1:
    raise ValueError(f'A batch of {batch_size} images.\nGive 1 or more.')
  parts = []
  for start in range(0, max(len(images), 1), batch_size):
    batch = images[start:start + batch_size]
    n = len(batch)
    pad = [(0, batch_size - n)] + [(0, 0)] * (images.ndim - 1)
    out = jax.device_get(function(np.pad(batch, pad)))
    parts.append(jax.tree.map(lambda x, n=n: x[:n], out))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def preprocessing(config_input, image_shape):
  """What a `Model` needs of a config's `input` section.

  Where eval_pp leaves the size to the data, a resize is added: it changes
  nothing in images that have the right size already.

  Args:
    config_input: mapping with eval_pp, mean, std.
    image_shape: (H, W, C) of evaluation images.
  """
  *size, channels = image_shape
  line = config_input['eval_pp'] or 'decode'
  ops = input_pipeline.parse_eval_pp(line)
  if not isinstance(ops[0], ops_lib.Decode):
    line = f'decode|{line}'
  if None in ops_lib.out_size(ops, None, None):
    line += f"|resize({size[0]}, {size[1]}, 'bilinear_antialias')"
  return {'eval_pp': line, 'mean': list(config_input['mean']),
          'std': list(config_input['std']), 'channels': channels,
          'image_shape': [*size, channels]}


def of_run(config, variables, class_names, image_shape, **facts):
  """The `Model` that a run has trained.

  Args:
    config: the run's whole config, as nested dicts.
    variables: see `Model`.
    class_names: see `Model`.
    image_shape: (H, W, C).
    **facts: in addition to what follows from the config; `step` is one.
  """
  seen = facts['step'] * config['global_batch_size']
  environment = workdir_lib.environment()
  return Model(config['model'], variables, class_names,
               preprocessing(config['input'], image_shape), {
                   **facts, 'examples_seen': seen, 'seed': config['seed'],
                   'config': config, 'written_by': environment})


def export(workdir, config, data, state, metrics):
  """Writes a run's model into its workdir; process 0 does.

  Args:
    workdir: the run's folder.
    config: as nested dicts.
    data: `input_pipeline.open_data`'s.
    state: `TrainState`, with the statistics that evaluation uses. Its averages
      are exported where it has some.
    metrics: {name: number} of the last evaluation.
  """
  variables = sharding.gather(
      state.ema_variables() if state.ema else state.variables())
  if jax.process_index():
    return
  precise = config['precise_bn']['examples']
  model = of_run(
      config, variables, data.class_names, data.eval_shape,
      step=int(state.step), metrics=metrics,
      weights='ema' if state.ema else 'raw',
      batch_stats=f'estimated on {precise} examples' if precise else 'running',
      data={'train': data.train.num_examples, **{
          name: source.num_examples for name, source in data.evals.items()}})
  path = os.path.join(workdir, NAME)
  if metric_writer.attempt(NAME, save, path, model):
    metric_writer.say(f'wrote {path}')


def exists(workdir):
  """Whether a run's folder has a model file."""
  return (epath.Path(workdir) / NAME).exists()


def save(path, model):
  """Writes a `Model` as one file; nothing is left behind where that fails.

  Args:
    path: of the file, local or gs://.
    model: `Model`.

  Raises:
    OSError: it cannot be written.
  """
  arrays = {f'{kind}/{name}': np.asarray(value, np.float32)
            for kind in _KINDS for name, value in param_paths.flatten(
                model.variables.get(kind, {})).items()}
  texts = {'vit_jax': VERSION, 'model': model.config,
           'class_names': model.class_names,
           'preprocessing': model.preprocessing, 'facts': model.facts}
  texts = {key: json.dumps(value) for key, value in texts.items()}
  if metric_writer.is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      local = os.path.join(folder, NAME)
      files.write_safetensors(local, arrays, texts)
      epath.Path(local).copy(path, overwrite=True)  # appears when complete
    return
  part = f'{path}.part'
  try:
    files.write_safetensors(part, arrays, texts)
    os.replace(part, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.remove(part)
    raise


def save_as(out, model):
  """`save` for a command's --out: a .safetensors file, or a folder for one.

  Returns:
    The file's path.

  Raises:
    ValueError: it cannot be written.
  """
  if not out.endswith('.safetensors'):
    workdir_lib.make(out)
    out = os.path.join(out, NAME)
  try:
    save(out, model)
  except OSError as e:
    raise ValueError(f'Cannot write {out}: {e.strerror or e}.\n'
                     'Name another file with --out.') from None
  return out


def load(path):
  """Reads a `Model`.

  Args:
    path: a model file or a folder (a run's workdir) that holds one, local or
      gs://.

  Returns:
    `Model`.

  Raises:
    ValueError: no such file, truncated, of another kind or of a newer version,
      or without some of the tensors. Cause and remedy on a line each.
  """
  found = epath.Path(os.path.expanduser(os.fspath(path)))
  if found.is_dir():
    found = found / NAME
  if not found.exists():
    raise ValueError(
        f'There is no model file {found}.\nGive a {NAME} or a folder that '
        'holds one; `vit-jax convert` makes one of a released checkpoint or of '
        'an older run.')
  if not metric_writer.is_remote(found):
    return _read(str(found), str(found))
  with tempfile.TemporaryDirectory() as folder:
    local = os.path.join(folder, NAME)
    found.copy(local)
    return _read(local, str(found))


def _read(path, name):
  is_ours = path.endswith('.safetensors')
  texts = files.metadata(path) if is_ours else {}
  if 'vit_jax' not in texts:
    raise ValueError(
        f'{name} is no model file of ours: it says nothing about itself.\n'
        f'Make one of it: vit-jax convert --checkpoint {name} --out {NAME}.')
  try:
    parsed = {key: json.loads(text) for key, text in texts.items()}
    if parsed['vit_jax'] > VERSION:
      raise ValueError(
          f'{name} has format {parsed["vit_jax"]}, and this program reads up '
          f'to {VERSION}.\nUpdate vit_jax.')
    tensors = files.open_file(path)
    variables = {kind: param_paths.unflatten({
        key[len(kind) + 1:]: tensor.load() for key, tensor in tensors.items()
        if key.startswith(f'{kind}/')}) for kind in _KINDS}
    return Model(parsed['model'], variables, parsed['class_names'],
                 parsed['preprocessing'], {**parsed['facts']})
  except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f'{name} is damaged: {type(e).__name__} in what it says '
                     'of itself.\nCopy or export it again.') from None
  except ValueError as e:
    message = str(e) if name in str(e) else f'{name}: {e}'
    raise ValueError(message) from None


def _check_variables(model):
  """Raises ValueError unless the arrays are the module's."""
  image = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
  wanted = jax.eval_shape(
      lambda key, x: model.module.init(key, x, train=False),
      jax.random.key(0), image)
  for kind in _KINDS:
    shapes = param_paths.flatten(wanted.get(kind, {}))
    here = param_paths.flatten(model.variables.get(kind, {}))
    missing = sorted(shapes.keys() - here.keys())
    left = sorted(here.keys() - shapes.keys())
    if missing or left:
      what = f'{kind} lacks {missing[0]}' if missing else (
          f'{kind} has {left[0]}, for which the model has no place')
      more = len(missing or left) - 1
      raise ValueError(
          f'{what}{f" and {more} more" if more else ""}.\nThe file was not '
          'written for this model: export it again.')
    for name, leaf in shapes.items():
      if here[name].shape != leaf.shape:
        raise ValueError(
            f'{name} is {here[name].shape} and the model has {leaf.shape}.\n'
            'The file was not written for this model: export it again.')
