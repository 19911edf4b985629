"""Times populations, against as many separate runs.

  vit-jax bench population --members 1,4,8,16

Prints, for each number of members and each form of their common step, trials
per hour and how many times as many they are as those of separate runs, one
after another, of the same model. A form is a driver of `population` and a form
of the stem's convolutions: vmap/xla, vmap/im2col, map/im2col, map/xla. A trial
is --trial_steps training steps, without start, input and evaluation, on one
batch of noise. Forms take turns, and a ratio is the median of those within a
turn; trust it on an idle machine only. All devices share the members; separate
runs have all devices, too.

Flags:
  --members P,P,...  (1,4,8,16)
  --forms F,F,...    (vmap/xla,vmap/im2col,map/im2col)
  --model SIZE, --stem NAME, --batch N, --size N    what is trained: examples
                     and pixels a side (micro, conv, 64, 32)
  --optimizer NAME   adamw or sgd (adamw)
  --trial_steps N    (811: 40 epochs of digits)
  --rounds N         turns (7)
"""
import functools
import time

from absl import flags
import jax
import numpy as np

from vit_jax import choices
from vit_jax import devices
from vit_jax import experiment
from vit_jax import population
from vit_jax import recipes
from vit_jax import sharding
from vit_jax.models import convolutions

FORMS = tuple(f'{driver}/{conv}' for driver in population.DRIVERS
              for conv in convolutions.FORMS)
_SINGLE = 'separate'
_OPTIMIZERS = {'adamw': recipes.adamw, 'sgd': recipes.sgd}


def main(argv):
  """Runs the command; returns its exit code."""
  args = _parse(['vit-jax bench population', *argv])
  print(devices.summary())
  config = functools.partial(
      _config, args.model, args.stem, args.batch, args.size, args.optimizer)
  times, compiled = measure(config, args.members, args.forms, args.rounds)
  print(f'{"members":>7} {"form":12} {"compiled in":>11} {"ms a step":>10} '
        f'{"trials/h":>9} {"x separate":>10}')
  for (count, name), seconds in times.items():
    rate = count * 3600 / (np.median(seconds) * args.trial_steps)
    ratio = np.median(count * times[1, _SINGLE] / seconds)
    print(f'{count:7} {name:12} {compiled[count, name]:9.1f} s '
          f'{1e3 * np.median(seconds):10.1f} {rate:9.1f} {ratio:10.2f}')
  return 0


def _parse(argv):
  values = flags.FlagValues()
  flags.DEFINE_list('members', '1,4,8,16', 'P.', flag_values=values)
  flags.DEFINE_list('forms', 'vmap/xla,vmap/im2col,map/im2col', 'Forms.',
                    flag_values=values)
  for name, default in (('model', 'micro'), ('stem', 'conv'),
                        ('optimizer', 'adamw')):
    flags.DEFINE_string(name, default, name, flag_values=values)
  for name, default in (('batch', 64), ('size', 32), ('trial_steps', 811),
                        ('rounds', 7)):
    flags.DEFINE_integer(
        name, default, name, lower_bound=1, flag_values=values)
  try:
    rest = values(argv)
  except flags.Error as e:
    raise ValueError(
        f'{str(e).splitlines()[0].rstrip(".")}.\nSee --help.') from None
  if len(rest) > 1:
    raise ValueError(f'Unexpected argument {rest[1]!r}.\nSee --help.')
  if not all(text.isdecimal() and int(text) for text in values.members):
    raise ValueError(f'--members={",".join(values.members)} are no numbers of '
                     'members.\nGive such as --members=1,4.')
  values.members = sorted(set(map(int, values.members)))
  for form in values.forms:
    choices.check({'form': (form, FORMS)})
  choices.pick(_OPTIMIZERS, values.optimizer, 'optimizer')
  return values


def measure(config, members, forms, rounds):
  """Times steps of populations and of a single run, in turns.

  Args:
    config: `config(conv)` returns a ConfigDict.
    members: numbers of members.
    forms: of FORMS.
    rounds: turns that count; one more warms up.

  Returns:
    ({(members, form): seconds a step [rounds]}, {(members, form): seconds of
    compilation}). The separate run is (1, 'separate').
  """
  made = {(1, _SINGLE): _single(config('xla'))}
  for count in members:
    for form in forms:
      driver, conv = form.split('/')
      made[count, form] = _population(config(conv), count, driver)
  compiled, steps = {}, {}
  for name, make in made.items():
    begin = time.perf_counter()
    steps[name] = make()
    compiled[name] = time.perf_counter() - begin
  times = {name: [] for name in steps}
  for _ in range(rounds + 1):
    for name, step in steps.items():
      begin = time.perf_counter()
      step()
      times[name].append(time.perf_counter() - begin)
  return {name: np.array(t[1:]) for name, t in times.items()}, compiled


def _config(model, stem, batch, size, optimizer, conv):
  config = recipes.base()
  config.input.update(source='made', pp=f'decode|resize({size})',
                      eval_pp=f'decode|resize({size})')
  config.evaluators.test.split = 'val'
  config.model.update(size=model, stem=stem, conv=conv, pool='gap')
  config.optimizer = _OPTIMIZERS[optimizer](1e-3, 0.1)
  config.ema = dict(name='decay', decay=0.99)
  config.global_batch_size = batch
  config.data_seed = 0
  return experiment.checked(config)


def _single(config):
  """Returns what compiles a step of a run, and returns it."""
  run = experiment.create(config)
  state, batch = run.init_fn(run.hypers['key']), _batch(run)
  batch = jax.device_put(batch, sharding.batch(run.mesh))
  step = jax.jit(run.step, donate_argnums=0, out_shardings=(
      jax.tree.map(lambda x: x.sharding, run.abstract_state),
      sharding.replicated(run.mesh)))

  def compiled():
    with sharding.tracing(run.mesh):
      return _stepper(step.lower(state, batch, run.hypers).compile(),
                      state, batch, run.hypers)

  return compiled


def _population(config, count, driver):
  """The same for a population."""
  members = [dict(lr=1e-3 * 2 ** -i, seed=i) for i in range(count)]
  made = population.create(config, members, driver)
  states = made.init()
  batch = jax.device_put(_batch(made.run), made.batch_sharding)
  return lambda: _stepper(
      made.step.lower(states, batch, made.hypers).compile(), states, batch,
      made.hypers)


def _stepper(step, state, batch, hypers):
  """A function that goes on from its own last state."""
  def go_on():
    nonlocal state
    state, _ = step(state, batch, hypers)
    jax.block_until_ready(state)
  return go_on


def _batch(run):
  rng = np.random.default_rng(0)
  shape = run.batch_size, *run.data.image_shape
  return {'image': rng.integers(0, 256, shape, np.uint8),
          'label': rng.integers(
              0, len(run.data.class_names), run.batch_size, np.int32)}
