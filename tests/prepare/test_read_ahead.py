"""Pictures that threads read come in the order of the source, a bounded number of them ahead."""

import threading
import time

import pytest

from flowmap.prepare import read_ahead as module
from flowmap.prepare.encode import encode
from flowmap.prepare.read_ahead import read_ahead
from tests.support.encoding import Numbers, files, spec


class Uneven:
    """Each call takes another time. It remembers how many there were at once, and the positions that were asked for."""

    def __init__(self, count=23):
        self.numbers, self.lock, self.asked, self.now, self.most = Numbers(count=count), threading.Lock(), [], 0, 0

    def length(self):
        return self.numbers.count

    def items(self, start=0, stop=None):
        with self.lock:
            self.asked.append(start)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02 if start % 8 == 0 else 0.002)
        yield from self.numbers.items(start, stop)
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 23), (5, 15), (20, 40)])
def test_the_order_is_that_of_the_source(threads, start, stop, monkeypatch):
    monkeypatch.setattr(module, "num_cores", lambda: threads)
    source = Uneven()
    batches = list(read_ahead(source, start, stop, 4))
    keys = [item.key for batch in batches for item in batch]
    assert keys == [f"number {i}" for i in range(start, min(stop, 23))]
    assert all(len(batch) == 4 for batch in batches[:-1]) and source.most <= threads


def test_threads_read_at_once_and_not_far_ahead(monkeypatch):
    monkeypatch.setattr(module, "num_cores", lambda: 3)
    source = Uneven(400)
    batches = read_ahead(source, 0, 400, 4)
    next(batches)
    time.sleep(0.3)
    assert source.most == 3 and len(source.asked) <= 2 * 3 + 1
    batches.close()


def test_a_broken_source_ends_the_encoding(tmp_path):
    class Broken(Numbers):
        def items(self, start=0, stop=None):
            if start >= 10:
                raise OSError("the disk is gone")
            yield from super().items(start, stop)

    with pytest.raises(OSError, match="the disk is gone"):
        list(read_ahead(Broken(), 0, 23, 4))


def test_the_folder_is_that_of_one_thread(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    for threads in (1, 6):
        monkeypatch.setattr(module, "num_cores", lambda n=threads: n)
        encode(spec(), tmp_path / str(threads), batch_size=3)
    assert files(tmp_path / "1") == files(tmp_path / "6")
