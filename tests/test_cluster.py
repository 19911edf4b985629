"""Processes that Slurm or Kubernetes started, as their variables say it."""
import os
import subprocess
import sys

import pytest

from tests import runs
from vit_jax import cluster
from vit_jax import distributed
from vit_jax import errors
from vit_jax import train

STEP = {
    'SLURM_JOB_ID': '1234', 'SLURM_STEP_ID': '2', 'SLURM_NTASKS': '16',
    'SLURM_STEP_NUM_TASKS': '4', 'SLURM_STEP_NODELIST': 'gpu[007-008]',
    'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_NODEID': '1',
    'SLURM_PROCID': '3', 'SLURM_LOCALID': '1'}


def test_a_task_of_srun():
  found = cluster.find(environ=STEP)
  assert found[:3] == (f'gpu007:{61440 + 1236}', 4, 3)
  assert 'task 3 of 4' in found.source
  distributed.check_flags(*found[:3], 120)
  # Steps of one job that run at once have ports of their own.
  other = cluster.find(environ={**STEP, 'SLURM_STEP_ID': '3'})
  assert other.coordinator != found.coordinator


@pytest.mark.parametrize('nodes, first', [
    ('node001', 'node001'), ('node001,host2', 'node001'),
    ('node[001-015],host2', 'node001'), ('node[001,007-015],host2', 'node001'),
    ('rack1-n[3,5]-ib', 'rack1-n3-ib')])
def test_process_0_is_on_the_first_node(nodes, first):
  found = cluster.find(environ={**STEP, 'SLURM_STEP_NODELIST': nodes})
  assert found.coordinator.rpartition(':')[0] == first


@pytest.mark.parametrize('changes', [
    {'SLURM_STEP_ID': ''},  # the script of sbatch, the shell of salloc
    {'SLURM_STEP_NUM_TASKS': '1'},  # srun --ntasks=1 in a job of 16
])
def test_a_single_process_in_a_job_of_many_waits_for_nobody(changes):
  assert cluster.find(environ={**STEP, **changes}) == cluster.Processes()


def test_flags_go_first():
  found = cluster.find('a:1', 2, 0, environ=STEP)
  assert found == cluster.Processes('a:1', 2, 0)
  # And a part of them is not made up from elsewhere.
  found = cluster.find(num_processes=2, environ=STEP)
  with runs.refused('--coordinator and --process_id is missing'):
    distributed.check_flags(*found[:3], 120)


@pytest.mark.parametrize('changes, match', [
    ({'SLURM_PROCID': ''}, 'SLURM_PROCID is not set'),
    ({'SLURM_STEP_NUM_TASKS': 'many'}, 'SLURM_STEP_NUM_TASKS=many is no num'),
    ({'SLURM_STEP_NODELIST': ''}, 'SLURM_STEP_NODELIST is not set')])
def test_incomplete_variables(changes, match):
  with runs.refused(match):
    cluster.find(environ={**STEP, **changes})


@pytest.mark.parametrize('changes, expected', [
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [2, 3]),  # two tasks share four
    ({'CUDA_VISIBLE_DEVICES': '0,1'}, [1]),  # one each, unbound
    ({'CUDA_VISIBLE_DEVICES': '5'}, None),  # --gpus-per-task=1: its own
    ({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': '2'}, None),
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)'},
     None),  # one task a node
    ({'CUDA_VISIBLE_DEVICES': '0,1,2', 'SLURM_STEP_TASKS_PER_NODE': '4,1'},
     None),
    ({'CUDA_VISIBLE_DEVICES': ''}, None),  # CPUs
    ({'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_STEP_ID': ''}, None)])
def test_gpus_of_a_task(changes, expected):
  assert cluster.local_gpus({**STEP, **changes}) == expected


def test_gpus_that_do_not_divide():
  with runs.refused('2 Slurm tasks of this node see 3 GPUs'):
    cluster.local_gpus({**STEP, 'CUDA_VISIBLE_DEVICES': '0,1,2'})


def test_a_pod_of_an_indexed_job(monkeypatch):
  pod = {'JOB_COMPLETION_INDEX': '12'}
  name = 'vit-12.vit.default.svc.cluster.local'
  monkeypatch.setattr(cluster.socket, 'getfqdn', lambda: name)
  found = cluster.find(num_processes=16, environ=pod)
  assert found[:3] == ('vit-0.vit.default.svc.cluster.local:61440', 16, 12)
  # Without a number of processes the pods are runs of their own.
  assert cluster.find(environ=pod) == cluster.Processes()
  monkeypatch.setattr(cluster.socket, 'getfqdn', lambda: 'vit-12')
  with runs.refused('subdomain'):
    cluster.find(num_processes=16, environ=pod)


def test_train_says_what_is_missing(monkeypatch, tmp_path, capsys):
  for name, value in {**STEP, 'SLURM_PROCID': ''}.items():
    monkeypatch.setenv(name, value)
  workdir = tmp_path / 'run'
  assert train.main([f'--config={runs.DIGITS}', f'--workdir={workdir}']
                    ) == errors.BAD_INPUT
  assert capsys.readouterr().err.count('\n') == 2
  assert not os.path.exists(workdir)


# A run without a model: the processes add up their numbers.
SUM = '''
import sys
import jax, jax.numpy as jnp, numpy as np
from vit_jax import sharding, train
def run(config, workdir, **_):
  mesh = sharding.create_mesh({'data': -1})
  x = jax.make_array_from_process_local_data(
      sharding.batch(mesh), np.full(1, 1 + jax.process_index(), np.float32))
  print('sum', jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(x))
train.train_and_evaluate = run
sys.exit(train.main(sys.argv[1:]))
'''


def test_two_tasks_of_srun_are_one_run(tmp_path):
  # The port is made of the job's number.
  job = next(n for n in range(os.getpid() % 4096, 8192) if _is_free(n))
  tasks = [subprocess.Popen(
      [sys.executable, '-c', SUM, f'--config={runs.DIGITS}',
       f'--workdir={tmp_path}', '--peer_timeout_seconds=60'],
      cwd=runs.ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, env=runs.environment(
          SLURM_JOB_ID=str(job), SLURM_STEP_ID='0', SLURM_NTASKS='2',
          SLURM_STEP_NUM_TASKS='2', SLURM_STEP_NODELIST='localhost',
          SLURM_STEP_TASKS_PER_NODE='2', SLURM_NODEID='0',
          SLURM_PROCID=str(task), SLURM_LOCALID=str(task)))
           for task in (0, 1)]
  for task, process in enumerate(tasks):
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert f'Slurm step {job}.0: task {task} of 2, coordinator local' in text
    assert f'process {task} of 2: ' in text
    assert 'sum 3.0' in text


def _is_free(job):
  with runs.socket.socket() as s:
    return s.connect_ex(('localhost', 61440 + job % 4096)) != 0
