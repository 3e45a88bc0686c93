"""A worker for the tests of `benchmarks.paced`: it doubles a number at each step, or fails."""

from benchmarks.paced import Channel

channel = Channel()
number = channel.hear()["number"]
channel.tell({"number": number})
while True:
    if channel.hear() == "fail":
        raise RuntimeError("as it was told to")
    print("what a library says on standard output")
    number *= 2
    channel.tell({"number": number})
