"""Liveness by hand: where each value of a small program is, and when its buffer is free."""

from gemkit.executors.native.buffers import Allocation, Buffer, Slice
from gemkit.program.ir import Node, Program, Value

A, B, C, D = (Value(number, ("T", 8), "float32") for number in range(4))
HEADS = Value(4, ("T", 2, 4), "float32")  # B by another name
OUT, CAPPED = Value(5, ("R", 3), "float32"), Value(6, ("R", 3), "float32")


def allocation(*nodes: Node, output: Value = OUT) -> Allocation:
    return Allocation(Program(nodes, {}, output))


def node(op: str, result: Value, *reads: Value) -> Node:
    return Node(op, dict(zip("xyz", reads, strict=False)), (result,))


def test_a_buffer_is_free_after_the_last_read_and_taken_again():
    places = allocation(node("f", B, A), node("g", C, B), node("h", D, C))
    assert places.place(A) == Slice(0, 0, 8)
    assert places.place(B) == Slice(1, 0, 8)  # A is still there
    places.release(0)
    assert places.place(C) == Slice(0, 0, 8)
    places.release(1)
    assert places.place(D) == Slice(1, 0, 8)
    assert places.buffers == [Buffer(8, "T")] * 2


def test_a_renamed_value_lives_as_long_as_its_name():
    places = allocation(node("split_heads", HEADS, B), node("f", C, A), node("g", D, HEADS))
    places.place(B)
    places.release(0)
    places.release(1)
    assert places.at(HEADS) == places.at(B) == Slice(0, 0, 8)
    assert places.place(C) == Slice(1, 0, 8)
    places.release(2)
    assert places.place(D) == Slice(0, 0, 8)


def test_a_result_takes_the_place_of_what_nobody_reads_again():
    places = allocation(node("f", B, A), node("g", C, B, A), node("h", D, C))
    places.place(A)
    assert places.over(0, A, B).buffer == 1  # A is read by the next node
    assert places.over(1, A, C).buffer == 0


def test_the_callers_array_holds_what_is_capped_in_place_and_is_never_free():
    places = allocation(node("f", B, A), node("linear", OUT, B), node("softcap", CAPPED, OUT), output=CAPPED)
    assert places.is_result(OUT)
    assert places.is_result(CAPPED)
    assert not places.is_result(B)
    places.place(B)
    places.place(OUT)
    assert places.buffers[1] == Buffer(3, "R", "logits")
    assert places.over(2, OUT, CAPPED) == Slice(1, 0, 3)
    places.release(2)
    assert places.new(3, "R", "logits") == 2


def test_a_value_is_quantized_once():
    places = allocation(node("f", B, A), node("g", C, A))
    places.place(A)
    assert places.quantized(A, "T") == (Slice(1, 0, 8), True)
    assert places.quantized(A, "T") == (Slice(1, 0, 8), False)
    assert places.buffers[1] == Buffer(8, "T", "quantized")
