import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.item_index import DuplicateIdError, ItemIndex, build_index

INT64 = st.integers(-(2**63), 2**63 - 1)


def integers(*values: int) -> ItemIndex:
    index, _ = build_index(np.array(values, np.int64))
    return index


def order_of(ids: "np.ndarray[tuple[int], np.dtype[np.int64]] | list[str]") -> list[int]:
    _, order = build_index(ids)
    return order.tolist()


def found(index: ItemIndex, item_ids: list[int] | list[str]) -> list[bool]:
    return (index.find(item_ids) != index.num_items).tolist()


@given(st.lists(INT64, unique=True, min_size=1, max_size=200), st.lists(INT64, max_size=20))
def test_integers_are_found_where_they_lie(ids: list[int], others: list[int]) -> None:
    index, order = build_index(np.array(ids, np.int64))
    asked = ids + others

    rows = index.find(asked)

    place = {ids[source]: row for row, source in enumerate(order.tolist())}
    assert rows.tolist() == [place.get(item_id, len(ids)) for item_id in asked]


@given(
    st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=200),
    st.lists(st.text(min_size=1), max_size=20),
)
def test_texts_are_found_where_they_lie(ids: list[str], others: list[str]) -> None:
    index, order = build_index([*ids, "\ud800", "\udcff"])
    asked = [*ids, *others, "\udcff"]

    rows = index.find(asked)

    place = {[*ids, "\ud800", "\udcff"][source]: row for row, source in enumerate(order.tolist())}
    assert rows.tolist() == [place.get(item_id, len(ids) + 2) for item_id in asked]


def test_integer_asked_as_text_is_the_same_id() -> None:
    index = integers(7, -3, 10)

    assert index.find(["10", "7", "-3"]).tolist() == index.find([10, 7, -3]).tolist()


def test_text_that_python_reads_as_the_number_is_another_id() -> None:
    assert found(integers(7, 10), ["07", "7", " 7", "1_0", "+7", "\u0667", "7.0"]) == [
        *(False, True, False, False, False, False, False)
    ]


def test_integer_beyond_64_bits_is_not_in_a_table_of_integers() -> None:
    assert found(integers(7, 0), [2**64 + 7, 7, -(2**63) - 1, 2**63]) == [
        *(False, True, False, False)
    ]


def test_integer_asked_of_a_table_of_texts_is_its_text() -> None:
    index, _ = build_index(["a", "12"])

    assert found(index, [12, 13]) == [True, False]


def test_ids_with_a_pattern_do_not_crowd() -> None:
    for step in (1, 1 << 20, 1 << 44, 0x9E3779B97F4A7C15 % (1 << 40)):
        index, _ = build_index(np.arange(100_000, dtype=np.int64) * step)
        assert index.window <= 16, step


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65])
def test_small_tables_are_whole(size: int) -> None:
    ids = np.arange(size, dtype=np.int64)

    index, order = build_index(ids)

    assert index.find(ids[order].tolist()).tolist() == list(range(size))


def test_empty_table_finds_nothing() -> None:
    index, order = build_index([])

    assert index.find(["a", "b"]).tolist() == [0, 0]
    assert order.tolist() == []


def test_nothing_asked_finds_nothing() -> None:
    assert len(integers(7).find([])) == 0


def test_id_that_is_there_twice_is_told_where_it_comes_again_first() -> None:
    with pytest.raises(DuplicateIdError) as of_integers:
        build_index(np.array([5, 6, 7, 6, 5], np.int64))
    with pytest.raises(DuplicateIdError) as of_texts:
        build_index(["a", "b", "c", "b", "a"])

    assert (of_integers.value.row, of_texts.value.row) == (3, 3)
