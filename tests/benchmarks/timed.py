"""A worker for the tests of `benchmarks.training`: its steps take what its job says they do."""

from benchmarks.paced import Channel

channel = Channel()
job = channel.hear()
channel.tell({})
while True:
    channel.hear()
    seconds = job["seconds"][str(job["micro_batch"])]
    channel.tell({"tokens": 100, "seconds": seconds, "matrix_rate": 1e11})
