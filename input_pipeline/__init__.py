"""The input pipeline: from bytes on disk to uint8 batches on the host.

  data = input_pipeline.open_data(config.input, data_seed)
  batches = input_pipeline.train_batches(
      data, global_batch_size=1024, data_seed=data_seed, start_step=step)
  with to_device.prefetch(batches, sharding) as batches: ...

A batch is a dict of this process's rows, b = global_batch_size / processes:
  image  uint8 [b, H, W, C], C 1 or 3, in [0, 255]; the step scales it
  label  int32 [b], in [0, len(data.class_names))
  mask   bool [b], evaluation only: False in rows that pad the last batch

Which example stands where, and every random number, is a function of
(data_seed, epoch, index) alone: see `order`. This package never imports
vit_jax, and TensorFlow only once image files on disk are read.
"""
from input_pipeline import to_device
from input_pipeline.dataset import class_counts
from input_pipeline.dataset import Data
from input_pipeline.dataset import image_shape
from input_pipeline.dataset import open_data
from input_pipeline.dataset import parse_eval_pp
from input_pipeline.pipeline import eval_batches
from input_pipeline.pipeline import preprocess
from input_pipeline.pipeline import train_batches

__all__ = [
    'Data', 'class_counts', 'eval_batches', 'image_shape', 'open_data',
    'parse_eval_pp', 'preprocess', 'to_device', 'train_batches',
]
