"""Plans: against compilers, real arrays, and arithmetic by hand."""
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from tests import test_sharding
from vit_jax import chips
from vit_jax import collectives
from vit_jax import complexity
from vit_jax import estimate
from vit_jax import liveness
from vit_jax import out_of_memory
from vit_jax import program
from vit_jax import recipes
from vit_jax import sharding
from vit_jax import tpu_topology
from vit_jax.commands import plan

IMAGENET = (1_281_167, 1000, (224, 224, 3))


def config(size, stem, batch, mesh, **changes):
  c = recipes.base()
  c.model.update(size=size, stem=stem)
  if stem == 'conv':
    c.model.batch_norm_group = batch
  c.model.attention, c.optimizer.clip_norm = 'xla', 1.0
  c.global_batch_size = 8 * batch
  c.mesh = dict(data=1, fsdp=1, tensor=1) | mesh
  c.update_from_flattened_dict(changes)
  return c


SCAN = {'model.scan': True, 'model.remat': 'full'}
KERNEL = {'model.attention': 'auto'}
# GB a chip, peak_memory_in_bytes of the step compiled for v5p:2x2x2 by libtpu
# 0.0.42.1, JAX 0.10.2; with XLA's attention but where it says otherwise.
TPU_COMPILER = {
    'C-18GF data': (7.42, ('18GF', 'conv', 64, dict(data=8)), {}),
    'C-18GF kernel': (4.65, ('18GF', 'conv', 64, dict(data=8)), KERNEL),
    'C-18GF fsdp': (8.26, ('18GF', 'conv', 64, dict(fsdp=8)), {}),
    'L/16 data': (20.96, ('L/16', 'patchify', 64, dict(data=8)), {}),
    'L/16 fsdp': (21.61, ('L/16', 'patchify', 64, dict(fsdp=8)), {}),
    'G/14 data': (35.62, ('G/14', 'patchify', 32, dict(data=8)), SCAN),
    'G/14 fsdp': (7.24, ('G/14', 'patchify', 32, dict(fsdp=8)), SCAN),
    'G/14 kernel fsdp': (
        6.90, ('G/14', 'patchify', 32, dict(fsdp=8)), SCAN | KERNEL),
}


@pytest.mark.parametrize('case', [
    pytest.param(case, marks=[pytest.mark.slow] * ('16' in case))
    for case in TPU_COMPILER])
def test_memory_is_what_the_tpu_compiler_says(case):
  gigabytes, args, changes = TPU_COMPILER[case]
  needs = estimate.of(config(*args, **changes), *IMAGENET, 'tpu', 8)
  assert needs.memory / 1e9 == pytest.approx(gigabytes, rel=0.15)


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec('libtpu'), reason='needs libtpu')


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_tpus_that_are_not_here():
  c = config('S/16', 'conv', 32, dict(data=-1))
  c.input.num_train, c.input.num_classes = IMAGENET[:2]
  c.input.update(source='tfds', path='imagenet2012:5.1.0',
                 pp='decode|inception_crop(224)')
  c.global_batch_size = 128
  text = plan.compiled(c, 'v5p:2x2x1')
  assert 'data 4 x fsdp 1 x tensor 1; 32 examples' in text
  assert 'GB of 102.01 GB' in text and 'chip-hours' in text
  with runs.refused('No topology'):
    plan.compiled(c, 'v99:2x2')


def test_what_is_held_is_what_arrays_take():
  sizes = dict(data=2, fsdp=2, tensor=2)
  c = test_sharding.config('conv', **test_sharding.mesh_of(**sizes))
  needs = estimate.of(c, 1000, 10, (32, 32, 3), 'cpu', 8)
  made = program.create(
      c, 1000, 10, (32, 32, 3), sharding.create_mesh(c.mesh))
  state = made.init_fn(made.hypers['key'])
  held = lambda tree: sum(leaf.addressable_shards[0].data.nbytes
                          for leaf in jax.tree.leaves(tree))
  assert needs.params == held(state.params)
  assert needs.optimizer == held(state.opt_state)


def test_a_fused_chain_holds_its_ends():
  a, b, c = (jnp.zeros(s) for s in ((64, 256), (256, 512), (512, 128)))
  array = lambda *shape: 4 * np.prod(shape)
  peak = lambda fn, *args: liveness.peak(jax.make_jaxpr(fn)(*args))
  # Elementwise: the result alone, if it is not written over its argument.
  assert peak(lambda x: jnp.sin(jnp.exp(x) + 1) * 2, a) == 0
  assert peak(lambda x: jnp.sin(jnp.exp(x) + 1) > 2, a) == array(64, 256) / 4
  # A matmul, what is elementwise of it, as operand of the next; the next.
  assert peak(lambda x: jnp.tanh(x @ b) @ c, a) == (
      array(64, 512) * 2 + array(64, 128))
  # A loop: what a trip holds, once, beside what is stacked.
  def body(x, _):
    return jnp.tanh(x @ b) @ b.T, x
  assert peak(lambda x: jax.lax.scan(body, x, length=10)[1], a) == (
      array(10, 64, 256) + array(64, 256)  # stacked, and the carry
      + 2 * array(64, 512) + array(64, 256))


def test_remat_and_micro_batches_are_seen():
  memory = lambda **changes: estimate.of(
      config('S/16', 'conv', 64, dict(data=8), **changes), *IMAGENET, 'tpu', 8)
  plain = memory()
  full = memory(**{'model.remat': 'full'})
  assert full.temporaries < plain.temporaries / 3
  # The blocks forward a second time, but for each one's last matmul.
  assert 1.15 < full.flops / plain.flops < 1.30
  fourth = memory(accumulation_steps=4, **{'model.batch_norm_group': 16})
  assert fourth.temporaries < plain.temporaries / 2.5
  assert fourth.flops == plain.flops
  # Three times the forward pass, but for the first layer's input.
  model = complexity.of(program.create(
      config('S/16', 'conv', 64, dict(data=1)), *IMAGENET,
      sharding.create_mesh({}, jax.devices()[:1])).model, 224)
  assert plain.flops / 64 == pytest.approx(6 * model.macs, rel=0.03)


@pytest.mark.parametrize('scan', [False, True])
def test_exchanges_are_those_of_the_algebra(scan):
  c = test_sharding.config('patchify', **{
      'model.scan': scan, **test_sharding.mesh_of(data=8)})
  needs = estimate.of(c, 1000, 10, (32, 32, 3), 'cpu', 8)
  made = program.create(
      c, 1000, 10, (32, 32, 3), sharding.create_mesh(c.mesh))
  found = collectives.of_program(made.compile_step().as_text())
  gradients = 4 * sum(x.size for x in jax.tree.leaves(made.trained))
  for of in (needs.exchanged, found):
    assert of['all-reduce'][1] == pytest.approx(gradients, rel=0.02)
  assert set(needs.exchanged) == {'all-reduce'}


def test_loops_count_as_often_as_they_run():
  mesh = sharding.create_mesh(dict(data=8))
  split, whole = sharding.batch(mesh), sharding.replicated(mesh)

  def fn(x):
    def body(y, _):
      return jax.lax.with_sharding_constraint(
          jnp.broadcast_to(y.sum(0, keepdims=True), y.shape) * 0.5, split), None
    return jax.lax.scan(body, x, length=7)[0]
  compiled = jax.jit(fn, in_shardings=split, out_shardings=split).lower(
      jnp.zeros((8, 128))).compile()
  assert collectives.of_program(compiled.as_text()) == {
      'all-reduce': (7, 7 * 4 * 128, 7 * 2 * 7 * 4 * 128 // 8)}
  gather = jax.jit(lambda x: x * 2, in_shardings=split, out_shardings=whole)
  text = gather.lower(jnp.zeros((8, 128))).compile().as_text()
  assert collectives.of_program(text) == {
      'all-gather': (1, 4 * 8 * 128, 4 * 7 * 128)}
  # A TPU gathers beside matmuls, in several fusions that are one exchange.
  part = lambda name, channel: f'''
%{name} (p: bf16[8]) -> bf16[64] {{
  ROOT %g.{name} = bf16[64]{{0}} all-gather(%p), channel_id={channel}, \
replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]) {{'axis_0'}}
}}'''
  call = lambda name: f'  %{name}.1 = bf16[64]{{0}} fusion(%p), calls=%{name}\n'
  text = ''.join([part('start', 5), part('beside', 5), part('done', 5),
                  part('another', 6), '\nENTRY %main (p: bf16[8]) -> f32[] {\n',
                  *map(call, ('start', 'beside', 'done', 'another')), '}'])
  assert collectives.of_program(text) == {
      'all-gather': (2, 2 * 128, 2 * 112)}
  # A ring of 4 sends 3/4 of an array, an all-reduce twice as much.
  found = collectives.of_sharding(
      1, weights=800, kernels=400, others=0, activation=0,
      sizes=dict(data=2, fsdp=4, tensor=1))
  assert found == {
      'all-gather': (2, 1600, 1200), 'reduce-scatter': (1, 400, 300),
      'all-reduce': (1, 100, 100)}
  assert collectives.seconds(found, 100.) == 16


def test_exchanges_of_micro_batches_and_frozen_layers():
  exchanged = lambda mesh, **changes: estimate.of(
      config('S/16', 'patchify', 32, dict(mesh), **changes), *IMAGENET, 'tpu',
      8).exchanged
  four = dict(accumulation_steps=4)
  for mesh in (dict(data=8), dict(fsdp=8)):
    one, more = exchanged(mesh), exchanged(mesh, **four)
    for kind in one:
      assert more[kind].bytes == 4 * one[kind].bytes
  # The head alone learns: its gradient is all that is reduced.
  head = exchanged(dict(data=8), frozen=('(?!head/).*',))
  assert head['all-reduce'].bytes == 2 * 384 * 1000 + 4 * 1000
  # By `tensor` stem and head are not divided.
  flops = lambda **mesh: estimate.of(
      config('S/16', 'patchify', 32, mesh), *IMAGENET, 'tpu', 8).flops
  # Twice the examples a device.
  assert 1 < flops(data=4, tensor=2) / flops(data=8) < 1.02


def test_no_kernel_where_heads_are_divided():
  memory = lambda **changes: estimate.of(
      config('S/16', 'patchify', 32, dict(data=4, tensor=2), **changes),
      *IMAGENET, 'tpu', 8).memory
  assert memory(**KERNEL) == memory()


@needs_libtpu
@pytest.mark.parametrize('name, mesh', [
    ('v5e:4x4', dict(tensor=4)), ('v6e:4x4', dict(tensor=2)),
    ('v5p:4x4x4', dict(tensor=4)), ('v5p:4x4x4', dict(fsdp=32)),
    ('v6e:8x8', dict(fsdp=16)), ('v6e:16x16', dict(fsdp=32)),
    ('v4:2x2x2', dict(fsdp=2, tensor=2))])
def test_meshes_of_real_slices(name, mesh):
  devices = tpu_topology.devices(name)
  made = sharding.create_mesh({'data': -1} | mesh, devices)
  assert {d.id for d in made.devices.flat} == {d.id for d in devices}
  # A process reads the examples of its devices.
  for group in made.devices.reshape(-1, made.shape['tensor']):
    assert len({d.process_index for d in group}) == 1


def test_a_compiler_that_gives_up_is_advised(monkeypatch):
  def compile_step(self):
    raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Used 17.5G of 15.75G hbm.')
  monkeypatch.setattr(program.Program, 'compile_step', compile_step)
  monkeypatch.setattr(
      tpu_topology, 'devices', lambda name: jax.devices())
  c = config('S/16', 'conv', 32, dict(data=-1))
  c.input.num_train, c.input.num_classes = IMAGENET[:2]
  c.input.update(source='tfds', path='imagenet2012:5.1.0',
                 pp='decode|inception_crop(224)')
  text = plan.compiled(c, 'v5e:2x4')
  assert 'gives up: RESOURCE_EXHAUSTED: Used 17.5G' in text
  assert '8 devices, an estimate)' in text
  assert 'does not fit' in text and '--config.model.remat=full' in text


def test_remedies_are_of_less_memory():
  c = config('L/16', 'patchify', 64, dict(data=8), **{'model.scan': True})
  c.mesh.data = -1
  before = estimate.of(c, *IMAGENET, 'gpu', 8).memory
  found = out_of_memory.figures(c, (*IMAGENET, 'gpu', 8), most=9)
  assert len(found) >= 5 and 'mesh.fsdp=8' in found
  for text in found.values():
    assert float(text.split()[0]) < before / 1e9


def test_groups_that_a_run_would_refuse_are_refused():
  c = config('S/16', 'conv', 64, dict(data=8), accumulation_steps=16)
  with runs.refused('model.batch_norm_group=64 is cut'):
    estimate.of(c, *IMAGENET, 'tpu', 8)
  c = config('S/16', 'conv', 64, dict(data=8), **{'model.batch_norm_group': 0},
             accumulation_steps=2)
  with runs.refused('BatchNorm has statistics of all 512'):
    estimate.of(c, *IMAGENET, 'tpu', 8)
  # One that is of several devices is none of these.
  c = config('S/16', 'conv', 64, dict(data=8), **{
      'model.batch_norm_group': 128})
  assert estimate.of(c, *IMAGENET, 'tpu', 8).memory


def test_devices_that_are_none(capsys):
  digits = [f'--config={runs.DIGITS}']
  for argv, match in (
      (['--devices=8'], 'go together'),
      (['--devices=8', '--device_kind=h900'], "Unknown device kind 'h900'"),
      (['--devices=8', '--device_kind=h100', '--topology=v5e:2x2'], 'both'),
      (['--devices=-1', '--device_kind=h100'], 'no number of devices')):
    with runs.refused(match) if match[0] != 'U' else pytest.raises(
        ValueError, match=match):
      plan.main([*digits, *argv])
  assert plan.main([*digits, '--devices=2', '--device_kind=a100']) == 0
  assert '# Devices (2 x a100, an estimate)' in capsys.readouterr().out


def test_devices_have_data_sheets():
  assert chips.of('TPU v5 lite') is chips.CHIPS['v5e']
  assert chips.of('NVIDIA H200') is chips.CHIPS['h200']
  assert chips.of('NVIDIA A100-SXM4-80GB') is chips.CHIPS['a100']
  assert chips.of('cpu') is None
