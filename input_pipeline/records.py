"""Files of serialized tf.train.Example: by index, or as a stream.

A TFRecord file has no index, but its records say how long they are: length
(uint64) at p, its checksum, the data at p + 12, another checksum, the next
record at p + 16 + length. One pass over these headers makes it as good as a
format with random access. ArrayRecord files bring their index.

Nothing here imports TensorFlow but for streams. An Example is parsed by
protobuf itself, 2-4 us a record; a parser in Python took 30-90, and
`tf.io.parse_single_example` would oblige the engine without TensorFlow to have
another one.
"""
import concurrent.futures
import os
import resource
import struct

from absl import logging
from google.protobuf import descriptor_pb2
from google.protobuf import descriptor_pool
from google.protobuf import message
from google.protobuf import message_factory
import numpy as np

from input_pipeline import cache


class TFRecords:
  """TFRecord files on a disk, by index."""

  def __init__(self, paths):
    """Reads the offsets of all records, from the cache if nothing changed.

    Raises:
      OSError: a file that cannot be read.
      ValueError: a file that does not consist of records.
    """
    self._paths = list(paths)
    stats = [os.stat(p) for p in self._paths]
    fingerprint = np.array(
        [[s.st_size, s.st_mtime_ns] for s in stats], np.int64)
    file = cache.path_of(
        'tfrecord', '\n'.join(map(os.path.abspath, self._paths)))
    found = cache.load(file, fingerprint, ('starts', 'counts'))
    if found is None or not _fits(found, fingerprint):
      logging.info('Indexing %d TFRecord files, once.', len(self._paths))
      with concurrent.futures.ThreadPoolExecutor(16) as pool:
        starts = list(pool.map(_record_starts, self._paths))
      found = {'starts': np.concatenate([np.zeros(0, np.int64), *starts]),
               'counts': np.array([len(s) for s in starts], np.int64)}
      cache.save(file, fingerprint, **found)
    self._starts = found['starts']
    self.counts = found['counts'].tolist()  # records in each file
    self._firsts = np.cumsum([0, *self.counts])[:-1]

  def read(self, file, record):
    """The bytes of one record of one file."""
    start = int(self._starts[self._firsts[file] + record])
    # Opened each time, for ~10 us: a data set has more files than a process
    # may hold open.
    descriptor = os.open(self._paths[file], os.O_RDONLY)
    try:
      length, = struct.unpack('<Q', os.pread(descriptor, 8, start))
      data = os.pread(descriptor, length, start + 12)
    finally:
      os.close(descriptor)
    if len(data) != length:
      raise OSError(f'the record ends after {len(data)} of {length} bytes')
    return data


def _fits(found, fingerprint):
  """Whether cached offsets can be those of the files."""
  starts, counts = found['starts'], found['counts']
  return (starts.dtype == counts.dtype == np.int64 and starts.ndim == 1
          and counts.shape == (len(fingerprint),)
          and counts.min(initial=0) >= 0 and counts.sum() == len(starts)
          and starts.min(initial=0) >= 0)


def _record_starts(path):
  """int64 [N], where each record of a TFRecord file begins."""
  starts, position = [], 0
  with open(path, 'rb', buffering=0) as f:
    descriptor, size = f.fileno(), os.fstat(f.fileno()).st_size
    while position < size:
      header = os.pread(descriptor, 8, position)
      length = struct.unpack('<Q', header)[0] if len(header) == 8 else size
      starts.append(position)
      position += 16 + length
  if position != size:
    raise ValueError(
        f'{path} is damaged: record {len(starts) - 1} does not end within it.\n'
        'Copy or prepare the data set again.')
  return np.array(starts, np.int64)


class ArrayRecords:
  """ArrayRecord files on a disk, by index.

  Records are fetched one by one, in the threads that decode them: 10 us each,
  14 in batches of 64, and no batch of files waits in memory.
  """

  def __init__(self, paths):
    """Opens all files.

    Raises:
      ValueError: array_record is not installed, or a file is damaged.
    """
    try:
      from array_record.python import array_record_module
    except ImportError:
      raise ValueError(
          'The data set is stored as ArrayRecord, and array_record is not '
          'installed.\npip install array_record, or prepare the data set as '
          'TFRecord.') from None
    paths = list(paths)
    # Each reader holds its file open, and 1024 is a usual limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < len(paths) + 512:
      wanted = len(paths) + 512
      if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    self._readers = []
    for path in paths:
      try:
        # No read-ahead: the records are asked for in random order.
        reader = array_record_module.ArrayRecordReader(
            path, options='readahead_buffer_size:0')
        ok = reader.ok()
      except (RuntimeError, ValueError, OSError):
        ok = False
      if not ok:
        raise ValueError(f'{path} is no ArrayRecord file, or damaged.\n'
                         'Copy or prepare the data set again.')
      self._readers.append(reader)
    self.counts = [r.num_records() for r in self._readers]

  def read(self, file, record):
    """The bytes of one record of one file."""
    try:
      return self._readers[file].read([int(record)])[0]
    except (RuntimeError, IndexError) as e:
      raise OSError(str(e)) from e


def stream(paths, skip):
  """Yields the records of TFRecord files one after the other, from `skip` on.

  Through TensorFlow, which opens gs:// and checks each record's checksum;
  skipped records are read but not looked at.
  """
  import tensorflow as tf
  tf.config.set_visible_devices([], 'GPU')
  data = tf.data.TFRecordDataset(list(paths), buffer_size=8 << 20)
  try:
    yield from data.skip(skip).prefetch(64).as_numpy_iterator()
  except tf.errors.OpError as e:
    raise ValueError(
        f'A TFRecord file cannot be read ({str(e.message).splitlines()[0]}).\n'
        'Check that it is there and complete.') from e


def _example_class():
  """The class of tf.train.Example, from its definition's field numbers."""
  file = descriptor_pb2.FileDescriptorProto(
      name='input_pipeline/example.proto', package='input_pipeline',
      syntax='proto3')
  field = descriptor_pb2.FieldDescriptorProto

  def define(name, *fields, within=file.message_type):
    made = within.add(name=name)
    for number, (key, kind, repeated) in enumerate(fields, 1):
      of_message = isinstance(kind, str)
      made.field.add(
          name=key, number=number,
          label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
          type=field.TYPE_MESSAGE if of_message else kind,
          type_name=f'.input_pipeline.{kind}' if of_message else None)
    return made

  define('BytesList', ('value', field.TYPE_BYTES, True))
  define('FloatList', ('value', field.TYPE_FLOAT, True))
  define('Int64List', ('value', field.TYPE_INT64, True))
  define('Feature', ('bytes_list', 'BytesList', False),
         ('float_list', 'FloatList', False), ('int64_list', 'Int64List', False))
  features = define('Features', ('feature', 'Features.Entry', True))
  entry = define('Entry', ('key', field.TYPE_STRING, False),
                 ('value', 'Feature', False), within=features.nested_type)
  del entry  # a list of pairs is on the wire what a map is
  define('Example', ('features', 'Features', False))
  pool = descriptor_pool.DescriptorPool()  # apart from TensorFlow's own
  pool.Add(file)
  return message_factory.GetMessageClass(
      pool.FindMessageTypeByName('input_pipeline.Example'))


_Example = _example_class()


def parse_example(data, image_key, label_key):
  """(bytes of the image, int label) of a serialized tf.train.Example.

  Raises:
    ValueError: it is none, or lacks one of the two features.
  """
  try:
    example = _Example.FromString(data)
  except message.DecodeError:
    raise ValueError('the record is no tf.train.Example') from None
  image = label = None
  for entry in example.features.feature:
    if entry.key == image_key and len(entry.value.bytes_list.value) == 1:
      image = entry.value.bytes_list.value[0]
    elif entry.key == label_key and len(entry.value.int64_list.value) == 1:
      label = entry.value.int64_list.value[0]
  if image is None or label is None:
    raise ValueError(
        f'the record holds no single {image_key!r} and {label_key!r}')
  return image, label
