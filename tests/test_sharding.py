"""Every division of the devices computes what one device does."""
import functools
import os
import re
import shutil
import types

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import input_pipeline
from tests import runs
from vit_jax import accumulation
from vit_jax import checkpoint
from vit_jax import experiment
from vit_jax import param_paths
from vit_jax import program
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import train as training

BATCH, STEPS = 64, 5
STRATEGIES = {
    'data': dict(data=8),
    'fsdp': dict(fsdp=8),
    'fsdp and replicas': dict(data=2, fsdp=4),
    'tensor': dict(data=4, tensor=2),
    'all': dict(data=2, fsdp=2, tensor=2),
}
MODELS = ('patchify', 'conv', 'mixer')


@functools.cache
def batches():
  config = recipes.base()
  config.input.pp = config.input.eval_pp = 'decode|resize(32)'
  data = input_pipeline.open_data(config.input, 0)
  stream = input_pipeline.train_batches(
      data, global_batch_size=BATCH, data_seed=0)
  return len(data.class_names), [next(stream) for _ in range(STEPS)]


def config(model, **changes):
  c = recipes.base()
  if model == 'mixer':
    c.model = recipes.mixer('Mixer-micro')
  elif model == 'bit':
    c.model = recipes.bit('BiT-micro')
  else:
    c.model.update(size='micro', stem=model)
  c.update(global_batch_size=BATCH, total_steps=STEPS, augment='mixup(0.2)')
  del c['total_epochs']
  # Steps large enough that the model has learned within five.
  c.optimizer, c.schedule = recipes.sgd(0.2, 1e-4), recipes.cosine(0.0)
  c.mesh = dict(data=1, fsdp=1, tensor=1)
  c.update_from_flattened_dict(changes)
  return c


@functools.cache
def train(model, **changes):
  """A run of STEPS: (losses, last state on the host, compiled step)."""
  c = config(model, **changes)
  size = c.mesh.data * c.mesh.fsdp * c.mesh.tensor
  mesh = sharding.create_mesh(c.mesh, jax.devices()[:size])
  classes, data = batches()
  made = program.create(c, 1000, classes, (32, 32, 3), mesh)
  hypers = sharding.put_tree(made.hypers, sharding.replicated(mesh))
  state, losses = made.init_fn(hypers['key']), []
  step = made.compile_step()
  for batch in data:
    state, metrics = step(
        state, jax.device_put(batch, sharding.batch(mesh)), hypers)
    losses.append(float(metrics['loss']))
  return np.array(losses), state, step


def mesh_of(**sizes):
  return {f'mesh.{axis}': size for axis, size in sizes.items()}


def assert_same_run(one, other, atol=2e-5):
  assert np.ptp(one[0]) > 0.02, 'the head is still zero: nothing is shown'
  np.testing.assert_allclose(other[0], one[0], rtol=1e-5)
  for path, leaf in param_paths.flatten(one[1].params).items():
    np.testing.assert_allclose(
        param_paths.flatten(other[1].params)[path], leaf, atol=atol,
        err_msg=path)


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('strategy', [
    pytest.param(name, marks=[pytest.mark.slow] * (name != 'all'))
    for name in STRATEGIES])
def test_every_strategy_is_one_device(model, strategy):
  sizes = STRATEGIES[strategy]
  one, other = train(model), train(model, **mesh_of(**sizes))
  assert_same_run(one, other)
  held = sum(leaf.addressable_shards[0].data.nbytes
             for leaf in jax.tree.leaves((other[1].params, other[1].opt_state)))
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(
      (other[1].params, other[1].opt_state)))
  # What is not divided: norms, biases, and (by tensor) stems.
  share = 1 / (sizes.get('fsdp', 1) * sizes.get('tensor', 1))
  assert share <= held / whole <= share + 0.1 * (share < 1)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [
    dict(tensor=2), dict(data=2, fsdp=2, tensor=2)], ids=['tensor', 'all'])
def test_a_resnet_is_divided_too(sizes):
  one, other = train('bit'), train('bit', **mesh_of(**sizes))
  # Its root, before a pool's maximum, turns rounding into more than others do.
  assert_same_run(one, other, atol=5e-4)
  kernel = other[1].params['stage_0_unit_00']['conv_2']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // (
      sizes.get('fsdp', 1) * 2)


def test_rows_of_a_process_follow_the_mesh(monkeypatch):
  mesh = sharding.create_mesh(dict(data=8))
  np.testing.assert_array_equal(sharding.local_rows(mesh, 16), np.arange(16))
  # The third and the first shard are of this process.
  held = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: {
      'a': (slice(4, 6),), 'b': (slice(None, 2),)})
  monkeypatch.setattr(sharding, 'batch', lambda mesh: held)
  assert sharding.local_rows(mesh, 16).tolist() == [0, 1, 4, 5]


def test_arrays_lie_as_the_rules_say():
  mesh = sharding.create_mesh(dict(data=2, fsdp=2, tensor=2))
  spec = lambda path, *shape: sharding.spec(path, shape, mesh)
  block = 'params/encoder/block_00'
  assert spec(f'{block}/attention/query/kernel', 64, 4, 16) == P(
      'fsdp', 'tensor', None)
  assert spec(f'{block}/attention/out/kernel', 4, 16, 64) == P(
      'tensor', None, 'fsdp')
  assert spec(f'{block}/mlp/fc1/kernel', 64, 192) == P('fsdp', 'tensor')
  assert spec(f'{block}/mlp/fc1/bias', 192) == P('tensor')
  assert spec(f'{block}/mlp/fc2/kernel', 192, 64) == P('tensor', 'fsdp')
  unit = 'stage_0_unit_00'
  assert spec(f'{unit}/conv_1/kernel', 1, 1, 256, 64) == P(
      None, None, 'fsdp', 'tensor')
  assert spec(f'stem/resnet/{unit}/conv_2/kernel', 3, 3, 64, 64) == P(
      None, None, 'tensor', 'fsdp')
  # Stacked: never over the blocks.
  assert spec('encoder/blocks/mlp/fc2/kernel', 48, 192, 64) == P(
      None, 'tensor', 'fsdp')
  assert spec('encoder/blocks/norm_mlp/scale', 96, 64) == P()
  assert spec(f'{block}/norm_mlp/scale', 64) == P()
  assert spec('stem/conv_1/kernel', 3, 3, 16, 32) == P(None, None, None, 'fsdp')
  assert spec('head/kernel', 65, 101) == P()  # not even
  # An EMA and moments lie where their parameters do.
  abstract = jax.eval_shape(lambda: {
      'ema': {'params': {'fc1': {'kernel': np.zeros((64, 192))}}}})
  assert jax.tree.leaves(sharding.of_state(abstract, mesh))[0].spec == P(
      'fsdp', 'tensor')


def test_divisions_that_are_none():
  with runs.refused('mesh.tensor=8 does not divide the 4 heads'):
    train('patchify', **mesh_of(tensor=8))
  with runs.refused('does not fit 8 device'):
    sharding.create_mesh(dict(data=3, fsdp=-1, tensor=2))


@pytest.mark.parametrize('model, group', [
    ('conv', 4), pytest.param('conv', 16, marks=pytest.mark.slow),
    pytest.param('patchify', 0, marks=pytest.mark.slow)])
@pytest.mark.parametrize('sizes', [
    {}, pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.slow)])
def test_four_micro_batches_are_one_batch(model, group, sizes):
  groups = {'model.batch_norm_group': group}
  one = train(model, **groups)
  other = train(model, accumulation_steps=4, **groups, **mesh_of(**sizes))
  np.testing.assert_allclose(other[0], one[0], rtol=2e-6)
  assert_same_run(one, other)
  for a, b in zip(jax.tree.leaves(one[1].batch_stats),
                  jax.tree.leaves(other[1].batch_stats), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_each_device_cuts_its_own_rows_where_groups_stay_whole():
  mesh = sharding.create_mesh(dict(data=8))
  rows = np.arange(64)
  split = lambda group: np.asarray(jax.jit(
      lambda x: accumulation.split(x, 2, group, mesh))(rows))
  np.testing.assert_array_equal(
      split(4)[0].reshape(8, 4)[:, 0], range(0, 64, 8))
  np.testing.assert_array_equal(split(8)[0], range(32))


@pytest.mark.parametrize('changes, match', [
    (dict(accumulation_steps=3), 'does not divide the 64 examples'),
    (dict(accumulation_steps=0), 'does not divide'),
    (dict(accumulation_steps=4), 'Set model.batch_norm_group=16, the largest'),
    ({'accumulation_steps': 4, 'model.batch_norm_group': 32},
     'model.batch_norm_group=32 is cut'),
])
def test_batches_that_cannot_be_cut(changes, match):
  with runs.refused(match):
    train('conv', **changes)


def test_momentum_in_bfloat16_halves_it():
  whole, state, _ = train('patchify')
  losses, half, _ = train('patchify', **{
      'optimizer.momentum_dtype': 'bfloat16'})
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  assert size(half.opt_state) == size(state.opt_state) / 2
  np.testing.assert_allclose(losses, whole, rtol=1e-2)
  assert (losses[2:] != whole[2:]).all()


@pytest.mark.parametrize('scan', [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_holds_its_activations_divided(scan):
  # Without the constraint at the start of each block, the partitioner gathers
  # whole activations in a scan: times 6 in memory here.
  def temporaries(**sizes):
    c = config('patchify', **{
        'model.scan': scan, 'model.size': 'micro-deep', 'model.remat': 'full',
        **mesh_of(**sizes)})
    mesh = sharding.create_mesh(
        c.mesh, jax.devices()[:c.mesh.data * c.mesh.fsdp])
    compiled = program.create(c, 1000, 10, (32, 32, 3), mesh).compile_step()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
  one, _ = temporaries()
  eight, text = temporaries(fsdp=8)
  assert eight < one / 4
  # No array of all 64 examples' tokens, as a gather would make.
  assert not re.search(r'f32\[64,17,(64|192)\]', text)


def test_a_checkpoint_goes_on_under_another_mesh_and_without_scan(
    finished, cache, tmp_path):
  workdir, results = finished  # data parallel, with scan, 4 steps
  half = str(tmp_path)
  shutil.copytree(workdir, half, dirs_exist_ok=True)
  shutil.rmtree(os.path.join(half, 'checkpoints', '4'))
  again = training.train_and_evaluate(runs.short(
      cache, mesh=dict(data=2, fsdp=2, tensor=2), model__scan=False), half)
  assert again == pytest.approx(results, rel=1e-4)
  name = lambda keys: '/'.join(re.findall(r'\w+', keys))
  scanned, blocks = ({name(keys): value for keys, value in
                      runs.arrays(w, 4).items()} for w in (workdir, half))
  # What a model with scan makes of the second.
  run = experiment.create(experiment.checked(runs.short(cache)))
  with checkpoint.Manager(half) as manager:
    state = manager.restore(run.abstract_state)
  stacked = {name(jax.tree_util.keystr(keys)): np.asarray(value)
             for keys, value in jax.tree_util.tree_leaves_with_path(state)}
  assert stacked.keys() == scanned.keys()
  kernels = [p for p in stacked if p.endswith('blocks/mlp/fc1/kernel')]
  assert len(kernels) >= 3  # parameters and two moments, at least
  for path in kernels:
    np.testing.assert_allclose(stacked[path], scanned[path], atol=2e-5)
    for i, kernel in enumerate(stacked[path]):
      np.testing.assert_array_equal(
          kernel, blocks[path.replace('blocks', f'block_{i:02d}')])


def test_weights_of_a_run_with_scan_start_one_without(
    finished, cache, tmp_path):
  workdir, _ = finished
  given = [checkpoint.init_from(
      runs.short(cache, model__scan=scan, init_from__run=workdir).init_from,
      experiment.create(experiment.checked(
          runs.short(cache, model__scan=scan))).variables)['params']
      for scan in (True, False)]
  stacked = given[0]['encoder/blocks/mlp/fc2/kernel']
  for i, kernel in enumerate(stacked):
    np.testing.assert_array_equal(
        given[1][f'encoder/block_{i:02d}/mlp/fc2/kernel'], kernel)
