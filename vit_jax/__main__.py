"""The command line: `vit-jax COMMAND ...`, `python -m vit_jax COMMAND ...`."""
import ast
import importlib
import importlib.util
import sys

COMMANDS = {
    # command: (module, one line)
    'train': ('vit_jax.train', 'train a model as a config says'),
    'plan': ('vit_jax.commands.plan', 'what a config will compute and cost'),
    'check-data': ('vit_jax.commands.check_data', 'decodes, counts all images'),
    'pack': ('vit_jax.commands.pack', 'smaller copies of images, in few files'),
    'augment-sheet': (
        'vit_jax.commands.augment_sheet', 'images before and after the ops'),
    'bench': ('vit_jax.commands.bench', 'times parts of the program'),
    'soak': ('vit_jax.commands.soak', 'memory of the input pipeline over time'),
    'doctor': ('vit_jax.commands.doctor', 'versions, devices, mismatches'),
    'zoo': ('vit_jax.commands.zoo', 'released checkpoints: list, download'),
    'convert': (
        'vit_jax.commands.convert', 'a model file of released weights, a run'),
    'predict': ('vit_jax.commands.predict', 'top classes of images'),
    'evaluate': ('vit_jax.commands.evaluate', 'accuracy of a model file'),
    'embed': ('vit_jax.commands.embed', 'features of images, from any layer'),
    'explain': ('vit_jax.commands.explain', 'attention drawn over images'),
    'export': ('vit_jax.commands.export', 'StableHLO, to serve with jax alone'),
    'soup': ('vit_jax.commands.soup', 'the average of several models'),
    'sweep': ('vit_jax.commands.sweep', 'one config at many points'),
    'study': ('vit_jax.commands.study', 'many runs: do them, report them'),
    'results': ('vit_jax.commands.results', 'final metrics of runs, by config'),
}


def main(argv=None):
  """Runs a command; returns its exit code. Help needs no import of jax."""
  argv = sys.argv[1:] if argv is None else list(argv)
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print('usage: vit-jax COMMAND ...\n\n' + '\n'.join(
        f'  {name:13} {line}' for name, (_, line) in COMMANDS.items())
        + '\n\nvit-jax COMMAND --help says more.')
    return 0
  name, rest = argv[0], argv[1:]
  if name not in COMMANDS:
    from vit_jax import choices
    from vit_jax import errors
    errors.show(choices.unknown(name, COMMANDS, 'command'))
    return errors.BAD_INPUT
  module = COMMANDS[name][0]
  if any(a in ('-h', '--help') for a in rest):
    # Of `bench tpu-compile`: bench_tpu_compile.
    part = f'{module}_{rest[0]}'.replace('-', '_')
    print(docstring(part if importlib.util.find_spec(part) else module))
    return 0
  try:
    return importlib.import_module(module).main(rest)
  except (ValueError, OSError) as e:
    from vit_jax import errors
    if not errors.is_message(e):
      raise
    errors.show(e)
    return errors.BAD_INPUT


def docstring(module):
  """The module's docstring, which is its help, without importing it."""
  path = importlib.util.find_spec(module).origin
  with open(path) as f:
    return ast.get_docstring(ast.parse(f.read()))


if __name__ == '__main__':
  sys.exit(main())
