"""PTX instructions, one by one, as C++ over runtime/ptx.h.

An instruction, a modifier or an operand that is not known here is an error: nothing is ever skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from ptx import BITS, Instruction, Kernel, PtxError

FLOATS = {"f16", "bf16", "f32", "f64"}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
SPACES = ("global", "shared", "local", "param", "const")
# Where data is cached changes nothing here.
CACHING = re.compile(r"ca|cg|cs|cv|lu|wb|wt|nc|L1::\w+|L2::(?!cache_hint)\w+")
SCOPES = ("cta", "cluster", "gpu", "sys")
DIRECTED = {"rm": "Rounding::down", "rp": "Rounding::up", "rz": "Rounding::zero"}
TO_INTEGRAL = {"rni": "std::rint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
COMPARISONS = {
    **{name: name for name in ("eq", "ne", "lt", "le", "gt", "ge", "num", "nan")},
    **{name: name for name in ("equ", "neu", "ltu", "leu", "gtu", "geu")},  # true where an operand is NaN
    **{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"},  # unsigned
}

VECTORS = {"%tid": "thread", "%ntid": "block_size", "%ctaid": "block", "%nctaid": "grid"}
SPECIAL = {
    **{f"{name}.{axis}": f"at.{member}.{axis}" for name, member in VECTORS.items() for axis in "xyz"},
    "%laneid": "at.lane",
    "%warpid": "at.warp",
    "%lanemask_eq": "(1u << at.lane)",
    "%lanemask_lt": "((1u << at.lane) - 1)",
    "%lanemask_le": "((2u << at.lane) - 1)",
    "%lanemask_gt": "~((2u << at.lane) - 1)",
    "%lanemask_ge": "~((1u << at.lane) - 1)",
    "%dynamic_smem_size": "at.dynamic_shared",
    "%total_smem_size": "(at.static_shared + at.dynamic_shared)",
    "%cluster_ctarank": "at.cluster_rank",
    "%cluster_nctarank": "at.cluster_size",
    "%cluster_ctaid.x": "at.cluster_rank",
    "%cluster_nctaid.x": "at.cluster_size",
    "%clusterid.x": "(at.block.x / at.cluster_size)",
    "%nclusterid.x": "(at.grid.x / at.cluster_size)",
}


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def register(name: str) -> str:
    """In C++: inline assembly has names without %."""
    return identifier(name.replace("%", "v_", 1) if name.startswith("%") else f"s_{name}")


def label(name: str) -> str:
    return "to_" + identifier(name)


def unsigned(kind: str) -> str:
    return f"u{BITS[kind]}"


class Surroundings(Protocol):
    """What an instruction has to know of its kernel."""

    kernel: Kernel
    shared: dict[str, int]  # offsets in the shared window
    addresses: dict[str, str]  # of other variables, in C++

    def add_site(self, instruction: Instruction) -> str: ...


Translator = Callable[["Operation"], str]
TRANSLATORS: dict[str, Translator] = {}


def translates(*roots: str) -> Callable[[Translator], Translator]:
    def add(function: Translator) -> Translator:
        TRANSLATORS.update(dict.fromkeys(roots, function))
        return function

    return add


class Operation:
    """One instruction being translated: what is not asked for by its translator is an error."""

    def __init__(self, surroundings: Surroundings, instruction: Instruction) -> None:
        self.surroundings = surroundings
        self.kernel = surroundings.kernel
        self.instruction = instruction
        self.operands = instruction.operands
        self.root, *rest = instruction.opcode.split(".")
        self.types = [word for word in rest if word in BITS]
        self.modifiers = [word for word in rest if word not in BITS]

    def translate(self) -> str:
        translator = TRANSLATORS.get(self.root)
        if translator is None:
            raise PtxError(f"unknown instruction {self.instruction.opcode}")
        code = translator(self)
        if self.modifiers:
            raise PtxError(f"unknown modifier {' '.join('.' + word for word in self.modifiers)}")
        return code

    # Modifiers and types

    def flag(self, *names: str) -> bool:
        found = [word for word in self.modifiers if word in names]
        self.modifiers = [word for word in self.modifiers if word not in names]
        return bool(found)

    def choice(self, names: object, default: str | None = None) -> str:
        """The modifier that is one of `names`, or `default`; an error where there is neither."""
        for word in self.modifiers:
            if word in names:  # type: ignore[operator]
                self.modifiers.remove(word)
                return word
        if default is None:
            raise PtxError(f"none of {', '.join(map(str, names))}")  # type: ignore[call-overload]
        return default

    def drop(self, pattern: re.Pattern[str]) -> None:
        self.modifiers = [word for word in self.modifiers if not pattern.fullmatch(word)]

    def space(self) -> str:
        """The state space; "generic" where none is named."""
        for word in self.modifiers:
            name = word.split("::")[0]
            if name in SPACES:
                self.modifiers.remove(word)
                return name
        return "generic"

    @property
    def type(self) -> str:
        if not self.types:
            raise PtxError("no known type")
        return self.types[-1]

    def require(self, *kinds: str) -> str:
        if self.type not in kinds:
            raise PtxError(f"type .{self.type}")
        return self.type

    def count(self, *numbers: int) -> None:
        if len(self.operands) not in numbers:
            raise PtxError(f"{len(self.operands)} operands")

    # Operands

    def get(self, operand: int | str, kind: str | None = None) -> str:
        """An operand as a C++ expression of a PTX type."""
        text = self.operands[operand] if isinstance(operand, int) else operand
        kind = kind or self.type
        if text.startswith("!"):
            return f"!{self.get(text[1:], kind)}"
        if text in self.kernel.registers:
            return register(text) if self.plain(text, kind) else f"get<{kind}>({register(text)})"
        if text in SPECIAL:
            return f"{kind}({SPECIAL[text]})"
        if (number := immediate(text)) is not None:
            return constant(number, kind)
        return f"{kind}({self.symbol(text)})"

    def plain(self, name: str, kind: str) -> bool:
        """Whether a register is of this type in C++ too."""
        return kind[0] in "pbu" and kind not in FLOATS and self.kernel.registers[name] == BITS[kind]

    def symbol(self, name: str) -> str:
        if name in self.surroundings.shared:
            return f"{self.surroundings.shared[name]}u"
        if name in self.kernel.parameters:
            return f"address(arguments[{self.kernel.parameters.index(name)}])"
        if name in self.surroundings.addresses:
            return self.surroundings.addresses[name]
        raise PtxError(f"unknown operand {name}")

    def set(self, operand: int | str, expression: str, kind: str | None = None) -> str:
        text = self.operands[operand] if isinstance(operand, int) else operand
        kind = kind or self.type
        if text == "_":
            return f"(void)({expression});"
        if text not in self.kernel.registers:
            raise PtxError(f"unknown register {text}")
        if self.plain(text, kind):
            return f"{register(text)} = {expression};"
        return f"set<{kind}>({register(text)}, {expression});"

    def vector(self, operand: int) -> list[str]:
        """The registers of `{%r1, %r2}`, or the only one."""
        text = self.operands[operand]
        return [word.strip() for word in text[1:-1].split(",")] if text.startswith("{") else [text]

    def site(self) -> str:
        return self.surroundings.add_site(self.instruction)

    def address(self, operand: int) -> str:
        """`[base + offset]` as a 64-bit expression."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", self.operands[operand])
        if match is None:
            raise PtxError(f"address {self.operands[operand]}")
        base, offset = match[1], int(match[2] or "0", 0)
        return self.get(base, "u64") + (f" + u64({offset}ll)" if offset else "")

    def pointer(self, operand: int, space: str, size: int, access: str) -> str:
        """A checked and counted `char*` to what an access touches."""
        address = self.address(operand)
        if space in ("param", "local", "const"):
            return f"reinterpret_cast<char*>({address})"
        if space == "shared":
            return f"emulator::shared_address({self.site()}, {address}, {size}, Access::{access})"
        if space == "generic":
            return f"emulator::generic_address({self.site()}, {address}, {size}, Access::{access})"
        return f"global_address<{size}>({self.site()}, {address}, Access::{access})"

    # Floating point

    def rounded(self, compute: Callable[..., str], first: int, last: int) -> str:
        """`compute` on operands first..last, with .ftz and .sat."""
        kind = self.type
        values = [self.get(index) for index in range(first, last + 1)]
        if self.flag("ftz"):
            values = [f"flush({value})" for value in values] if kind == "f32" else values
            result = f"flush({compute(*values)})" if kind == "f32" else compute(*values)
        else:
            result = compute(*values)
        return f"saturate({result})" if self.flag("sat") else result


def immediate(text: str) -> tuple[str, int] | None:
    """(type, pattern) of a number; integers have no type of their own."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return "f32", int(match[1], 16)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return "f64", int(match[1], 16)
    if match := re.fullmatch(r"([-+]?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        return "", int(match[1], 0)
    return None


def constant(number: tuple[str, int], kind: str) -> str:
    own, pattern = number
    if kind == "pred":
        return "true" if pattern else "false"
    pattern &= (1 << BITS[kind]) - 1
    if own in ("f32", "f64") and BITS[own] != BITS[kind]:
        raise PtxError(f".{own} constant as .{kind}")
    if kind in FLOATS:
        return f"bits<{kind}>({unsigned(kind)}({pattern:#x}ull))"
    return f"{kind}({pattern:#x}ull)"


# Control


@translates("ret", "exit")
def leave(op: Operation) -> str:
    op.flag("uni")
    return "return;"


@translates("bra")
def branch(op: Operation) -> str:
    op.flag("uni")
    return f"goto {label(op.operands[0])};"


@translates("brx")
def branch_by_index(op: Operation) -> str:
    op.flag("idx", "uni")
    op.count(2)
    targets = op.kernel.branch_targets[op.operands[1]]
    cases = " ".join(f"case {index}: goto {label(name)};" for index, name in enumerate(targets))
    site = op.site()
    return f'switch ({op.get(0, "u32")}) {{ {cases} default: emulator::fail(&{site}, "no such branch"); }}'


@translates("trap")
def trap(op: Operation) -> str:
    return f'emulator::fail(&{op.site()}, "trap");'


@translates("nanosleep")
def nanosleep(op: Operation) -> str:
    return "emulator::yield();"


@translates("prefetch", "prefetchu", "griddepcontrol")
def hint(op: Operation) -> str:
    op.modifiers.clear()
    return ""


# Memory


@translates("ld")
def load(op: Operation) -> str:
    space, kind = op.space(), op.type
    op.drop(CACHING)
    op.flag("v2", "v4", "v8", "weak", *SCOPES)
    volatile, acquire = op.flag("volatile"), op.flag("acquire")
    atomic = op.flag("relaxed") or acquire
    targets = op.vector(0)
    width = BITS[kind] // 8
    code = [f"const char* from = {op.pointer(1, space, width * len(targets), 'load')};"]
    function = "load_atomic" if atomic else "load"
    # All elements are read before one is written: the address may be in a target register.
    for index in range(len(targets)):
        code.append(f"const {kind} element{index} = {function}<{kind}>(from + {index * width});")
    code += [op.set(target, f"element{index}") for index, target in enumerate(targets)]
    if acquire:
        code.append("emulator::fence();")
    if volatile:
        code.append("emulator::yield();")
    return " ".join(code)


@translates("st")
def store(op: Operation) -> str:
    space, kind = op.space(), op.type
    op.drop(CACHING)
    op.flag("v2", "v4", "v8", "weak", "volatile", *SCOPES)
    release = op.flag("release")
    atomic = op.flag("relaxed") or release
    values = op.vector(1)
    width = BITS[kind] // 8
    code = [f"char* to = {op.pointer(0, space, width * len(values), 'store')};"]
    if release:
        code.append("emulator::fence();")
    function = "store_atomic" if atomic else "store"
    for index, value in enumerate(values):
        code.append(f"{function}<{kind}>(to + {index * width}, {op.get(value)});")
    return " ".join(code)


@translates("mov")
def move(op: Operation) -> str:
    op.count(2)
    kind = op.type
    if op.operands[1].startswith("{"):
        parts = op.vector(1)
        width = BITS[kind] // len(parts)
        words = [f"u64({op.get(part, f'u{width}')}) << {index * width}" for index, part in enumerate(parts)]
        return op.set(0, " | ".join(words), f"b{BITS[kind]}")
    if op.operands[0].startswith("{"):
        parts = op.vector(0)
        width = BITS[kind] // len(parts)
        code = [f"const u64 whole = {op.get(1, unsigned(kind))};"]
        code += [op.set(part, f"whole >> {index * width}", f"u{width}") for index, part in enumerate(parts)]
        return " ".join(code)
    return op.set(0, op.get(1))


@translates("cvta")
def convert_address(op: Operation) -> str:
    to, space = op.flag("to"), op.space()
    value = op.get(1)
    if space == "shared":
        value = f"emulator::generic_to_shared({value})" if to else f"emulator::shared_to_generic({value})"
    return op.set(0, value)


@translates("mapa")
def map_address(op: Operation) -> str:
    value, rank = op.get(1, "u64"), op.get(2, "u32")
    if op.flag("shared::cluster"):
        return op.set(
            0, f"({value} & ((1u << emulator::kWindowBits) - 1)) | u64({rank} + 1) << emulator::kWindowBits"
        )
    return op.set(0, f"emulator::map_to_rank({value}, {rank})")


# Update of an atomic: a function of what was there and of the operands.
ATOMIC = {
    "add": "add(old, value)",
    "min": "min(old, value)",
    "max": "max(old, value)",
    "and": "old & value",
    "or": "old | value",
    "xor": "old ^ value",
    "exch": "value",
    "inc": "old >= value ? 0 : old + 1",
    "dec": "old == 0 || old > value ? value : old - 1",
}


@translates("atom", "red")
def atomic(op: Operation) -> str:
    space = op.space()
    kind = op.require("b16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
    op.flag("relaxed", *SCOPES)
    both = op.flag("acq_rel")
    release = op.flag("release") or both
    acquire = op.flag("acquire") or both
    name = op.choice([*ATOMIC, "cas"])
    first = 0 if op.root == "red" else 1
    op.count(first + (3 if name == "cas" else 2))
    code = [
        f"char* to = {op.pointer(first, space, BITS[kind] // 8, 'update')};",
        f"const {kind} value = {op.get(first + 1)};",
    ]
    update = ATOMIC.get(name, "")
    if name == "cas":
        code.append(f"const {kind} fresh = {op.get(first + 2)};")
        update = "old == value ? fresh : old"
    if release:
        code.append("emulator::fence();")
    code.append(
        f"const {kind} before = atomic_update<{kind}>(to, [=]({kind} old) {{ return {kind}({update}); }});"
    )
    if acquire:
        code.append("emulator::fence();")
    if op.root == "atom":
        code.append(op.set(0, "before"))
    return " ".join(code)


@translates("membar", "fence")
def fence(op: Operation) -> str:
    op.flag("sc", "acq_rel")
    scope = op.choice(("cta", "cluster", "gl", "gpu", "sys"))
    # A fence within the block publishes nothing to other blocks.
    return "" if scope == "cta" else "emulator::fence();"


@translates("cp")
def copy_async(op: Operation) -> str:
    if not op.flag("async"):
        raise PtxError("unknown instruction cp")
    if op.flag("commit_group"):
        return "emulator::async_commit();"
    if op.flag("wait_all"):
        return "emulator::async_commit(); cp_async_wait(0);"
    if op.flag("wait_group"):
        return f"cp_async_wait({op.operands[0]});"
    op.choice(("ca", "cg"))
    op.drop(CACHING)
    op.flag("shared", "shared::cta")
    if op.space() != "global":
        raise PtxError("cp.async from elsewhere than global memory")
    op.count(3, 4)
    size = op.get(2, "u32")
    source = op.get(3, "u32") if len(op.operands) == 4 else size
    return f"cp_async({op.site()}, {op.address(0)}, {op.address(1)}, {size}, {source});"


# Arithmetic


def float_rounding(op: Operation) -> str:
    """The rounding mode; only f32 has other than to nearest."""
    mode = op.choice(("rn", *DIRECTED), default="rn")
    if mode != "rn" and op.type != "f32":
        raise PtxError(f".{mode} of .{op.type}")
    return mode


@translates("add", "sub", "mul")
def arithmetic(op: Operation) -> str:
    op.count(3)
    kind = op.type
    if op.root == "mul" and kind not in FLOATS | set(PAIRS):
        return multiply(op)
    if kind in PAIRS:
        op.flag("rn")
        return pairwise(op, op.root, 2)
    if kind not in FLOATS:
        return op.set(0, f"{op.root}({op.get(1)}, {op.get(2)})")
    mode = float_rounding(op)
    if mode == "rn":
        return op.set(0, op.rounded(lambda a, b: f"{op.root}({a}, {b})", 1, 2))
    as_fma = {"add": "{a}, 1.0f, {b}", "sub": "neg({b}), 1.0f, {a}", "mul": "{a}, {b}, -0.0f"}[op.root]
    return op.set(
        0, op.rounded(lambda a, b: f"fma_directed<{DIRECTED[mode]}>({as_fma.format(a=a, b=b)})", 1, 2)
    )


def pairwise(op: Operation, function: str, operands: int) -> str:
    """On both halves of 32-bit registers."""
    half = PAIRS[op.type]
    names = "abc"[:operands]
    parameters = ", ".join(f"{half} {name}" for name in names)
    values = ", ".join(op.get(index + 1, "b32") for index in range(operands))
    operation = f"[]({parameters}) {{ return {function}({', '.join(names)}); }}"
    return op.set(0, f"for_both<{half}>({operation}, {values})", "b32")


def multiply(op: Operation) -> str:
    form = op.choice(("lo", "hi", "wide"))
    if form == "wide":
        wide = f"{op.type[0]}{BITS[op.type] * 2}"
        return op.set(0, f"{wide}({op.get(1)}) * {wide}({op.get(2)})", wide)
    return op.set(0, f"{'mul' if form == 'lo' else 'mul_hi'}({op.get(1)}, {op.get(2)})")


@translates("fma")
def fused_multiply_add(op: Operation) -> str:
    op.count(4)
    if op.type in PAIRS:
        op.flag("rn")
        return pairwise(op, "fma", 3)
    op.require(*FLOATS)
    mode = float_rounding(op)
    function = "fma" if mode == "rn" else f"fma_directed<{DIRECTED[mode]}>"
    return op.set(0, op.rounded(lambda a, b, c: f"{function}({a}, {b}, {c})", 1, 3))


@translates("mad")
def multiply_add(op: Operation) -> str:
    op.count(4)
    if op.type in FLOATS:
        return fused_multiply_add(op)
    form = op.choice(("lo", "hi", "wide"))
    if form == "wide":
        wide = f"{op.type[0]}{BITS[op.type] * 2}"
        return op.set(0, f"add({wide}({wide}({op.get(1)}) * {wide}({op.get(2)})), {op.get(3, wide)})", wide)
    product = f"{'mul' if form == 'lo' else 'mul_hi'}({op.get(1)}, {op.get(2)})"
    return op.set(0, f"add({product}, {op.get(3)})")


@translates("div", "rem")
def division(op: Operation) -> str:
    op.count(3)
    if op.type in FLOATS:
        op.choice(("rn", "approx", "full"))
        return op.set(0, op.rounded(lambda a, b: f"divide({a}, {b})", 1, 2))
    return op.set(0, f"{op.root}({op.site()}, {op.get(1)}, {op.get(2)})")


@translates("min", "max")
def extreme(op: Operation) -> str:
    op.count(3)
    function = f"{op.root}_nan" if op.flag("NaN") else op.root
    if op.type in PAIRS:
        return pairwise(op, function, 2)
    return op.set(0, op.rounded(lambda a, b: f"{function}({a}, {b})", 1, 2))


@translates("neg", "abs")
def sign(op: Operation) -> str:
    op.count(2)
    if op.type in PAIRS:
        return pairwise(op, op.root, 1)
    return op.set(0, op.rounded(lambda a: f"{op.root}({a})", 1, 1))


@translates("copysign")
def copy_sign(op: Operation) -> str:
    return op.set(0, f"copysign({op.get(1)}, {op.get(2)})")


@translates("ex2", "lg2", "sqrt", "rsqrt", "rcp", "tanh", "sin", "cos")
def function_of_one(op: Operation) -> str:
    op.count(2)
    op.require(*FLOATS)
    op.choice(("approx", "rn"))
    return op.set(0, op.rounded(lambda a: f"{op.root}({a})", 1, 1))


# Bits and predicates


@translates("and", "or", "xor")
def bitwise(op: Operation) -> str:
    op.count(3)
    sign = {"and": "&", "or": "|", "xor": "^"}[op.root]
    return op.set(0, f"{op.get(1)} {sign} {op.get(2)}")


@translates("not")
def bitwise_not(op: Operation) -> str:
    return op.set(0, f"{'!' if op.type == 'pred' else '~'}{op.get(1)}")


@translates("cnot")
def logical_not(op: Operation) -> str:
    return op.set(0, f"{op.get(1)} == 0")


@translates("shl", "shr")
def shift(op: Operation) -> str:
    op.count(3)
    return op.set(0, f"{op.root}({op.get(1)}, {op.get(2, 'u32')})")


@translates("shf")
def funnel_shift(op: Operation) -> str:
    direction, mode = op.choice("lr"), op.choice(("wrap", "clamp"))
    count = op.get(3, "u32")
    count = f"({count} & 31)" if mode == "wrap" else f"std::min(32u, {count})"
    return op.set(0, f"shf_{direction}({op.get(1, 'u32')}, {op.get(2, 'u32')}, {count})", "u32")


@translates("popc", "clz")
def count_bits(op: Operation) -> str:
    function = "clz" if op.root == "clz" else "__builtin_popcountll"
    return op.set(0, f"{function}({op.get(1)})", "u32")


@translates("brev")
def reverse_bits(op: Operation) -> str:
    return op.set(0, f"brev({op.get(1)})")


@translates("bfind")
def find_bit(op: Operation) -> str:
    function = "bfind_shift" if op.flag("shiftamt") else "bfind"
    return op.set(0, f"{function}({op.get(1)})", "u32")


@translates("bfe")
def extract_bits(op: Operation) -> str:
    return op.set(0, f"bfe({op.get(1)}, {op.get(2, 'u32')}, {op.get(3, 'u32')})")


@translates("bfi")
def insert_bits(op: Operation) -> str:
    return op.set(0, f"bfi({op.get(1)}, {op.get(2)}, {op.get(3, 'u32')}, {op.get(4, 'u32')})")


@translates("prmt")
def permute_bytes(op: Operation) -> str:
    op.count(4)
    return op.set(0, f"prmt({op.get(1)}, {op.get(2)}, {op.get(3)})")


@translates("lop3")
def three_input_logic(op: Operation) -> str:
    op.count(5)
    return op.set(0, f"lop3<{op.operands[4]}>({op.get(1)}, {op.get(2)}, {op.get(3)})")


@translates("setp")
def compare(op: Operation) -> str:
    flushed = op.flag("ftz")
    comparison = COMPARISONS[op.choice(COMPARISONS)]
    combined = op.choice(("and", "or", "xor"), default="none")
    kind = unsigned(op.type) if op.type[0] == "b" and op.type != "bf16" else op.type
    values = [op.get(index, kind) for index in (1, 2)]
    if flushed and kind == "f32":
        values = [f"flush({value})" for value in values]
    result = f"{comparison}<{kind}>({', '.join(values)})"
    targets = [word.strip() for word in op.operands[0].split("|")]
    code = [f"const bool compared = {result};"]
    values = ["compared", "!compared"]
    if combined != "none":
        operator = {"and": "&", "or": "|", "xor": "^"}[combined]
        values = [f"{value} {operator} {op.get(3, 'pred')}" for value in values]
    code += [op.set(target, value, "pred") for target, value in zip(targets, values, strict=False)]
    return " ".join(code)


@translates("set")
def compare_to_number(op: Operation) -> str:
    comparison = COMPARISONS[op.choice(COMPARISONS)]
    result, kind = op.types
    compared = f"{comparison}<{kind}>({op.get(1, kind)}, {op.get(2, kind)})"
    yes = "1.0f" if result in FLOATS else "-1"
    return op.set(0, f"{result}({compared} ? {yes} : 0)", result)


@translates("selp")
def select(op: Operation) -> str:
    op.count(4)
    return op.set(0, f"{op.get(3, 'pred')} ? {op.get(1)} : {op.get(2)}")


@translates("testp")
def test_property(op: Operation) -> str:
    tests = {"finite": "std::isfinite", "infinite": "std::isinf", "number": "!is_nan", "notanumber": "is_nan"}
    return op.set(0, f"{tests[op.choice(tests)]}({op.get(1)})", "pred")


@translates("cvt")
def convert(op: Operation) -> str:
    to, source = op.types
    if to in PAIRS:
        op.count(3)
        op.choice(("rn",))
        half = PAIRS[to]
        # The first source is the upper half.
        return op.set(0, f"pair<{half}>(convert<{half}>({op.get(2)}), convert<{half}>({op.get(1)}))", "b32")
    op.count(2)
    value = op.get(1)
    flushed = op.flag("ftz")
    if flushed and source == "f32":
        value = f"flush({value})"
    result = conversion(op, to, source, value)
    if flushed and to == "f32":
        result = f"flush({result})"
    return op.set(0, result, to)


def conversion(op: Operation, to: str, source: str, value: str) -> str:
    saturated = op.flag("sat")
    if source in FLOATS and to not in FLOATS:
        rounding = TO_INTEGRAL[op.choice(TO_INTEGRAL)]
        return f"to_integer<{to}>({rounding}(f64({value})))"
    if source not in FLOATS and to not in FLOATS:
        return f"saturate_to<{to}>({value})" if saturated else f"{to}({value})"
    integral = op.choice(TO_INTEGRAL, default="none")
    mode = op.choice(("rn", *DIRECTED), default="rn")
    if integral != "none":
        result = f"convert<{to}>({TO_INTEGRAL[integral]}(f64({value})))"
    elif mode == "rn":
        result = f"convert<{to}>({value})"
    elif to == "f32" and (BITS[source] <= 32 or source == "f64"):  # exact in double
        result = f"round_directed<{DIRECTED[mode]}>(f64({value}), 0)"
    else:
        raise PtxError(f".{mode} from .{source} to .{to}")
    return f"saturate({result})" if saturated else result


# Barriers and warp collectives


@translates("bar", "barrier")
def barrier(op: Operation) -> str:
    if op.flag("warp"):
        op.flag("sync")
        return f"emulator::collective({op.site()}, emulator::Collective::sync, {op.get(0, 'u32')}, 0);"
    if op.flag("cluster"):
        op.flag("aligned", "acquire", "release", "relaxed")
        return f"emulator::cluster_barrier({op.site()});" if op.choice(("arrive", "wait")) == "wait" else ""
    op.flag("cta", "aligned")
    if op.flag("sync"):
        require_barrier_zero(op, 0, 1)
        return f"emulator::block_barrier({op.site()});"
    op.choice(("red",))
    result = op.choice(("popc", "and", "or"))
    require_barrier_zero(op, 1, 3)
    count = f"emulator::block_barrier_count({op.site()}, {op.get(2, 'pred')})"
    if result == "popc":
        return op.set(0, count, "u32")
    threads = "at.block_size.x * at.block_size.y * at.block_size.z"
    return op.set(0, f"{count} {'> 0' if result == 'or' else f'== {threads}'}", "pred")


def require_barrier_zero(op: Operation, index: int, operands: int) -> None:
    """Named barriers, and barriers for some of the threads, are not known."""
    op.count(operands)
    if op.operands[index] != "0":
        raise PtxError(f"named barrier {op.operands[index]}")


@translates("shfl")
def shuffle(op: Operation) -> str:
    op.flag("sync")
    kinds = {"bfly": "shuffle_xor", "up": "shuffle_up", "down": "shuffle_down", "idx": "shuffle_index"}
    kind = kinds[op.choice(kinds)]
    target, *in_range = (word.strip() for word in op.operands[0].split("|"))
    value, operand, clamp, mask = (op.get(index, "u32") for index in (1, 2, 3, 4))
    arguments = f"{op.site()}, emulator::Collective::{kind}, {mask}, {value}, {operand}, {clamp}"
    code = [f"const auto shuffled = emulator::shuffle({arguments});", op.set(target, "shuffled.value", "u32")]
    code += [op.set(predicate, "shuffled.in_range", "pred") for predicate in in_range]
    return " ".join(code)


@translates("vote")
def vote(op: Operation) -> str:
    op.flag("sync")
    mode = op.choice(("ballot", "any", "all"))
    mask = op.get(2, "u32")
    ballot = f"emulator::collective({op.site()}, emulator::Collective::vote, {mask}, {op.get(1, 'pred')})"
    if mode == "ballot":
        return op.set(0, ballot, "u32")
    return op.set(0, f"{ballot} {'!= 0' if mode == 'any' else f'== {mask}'}", "pred")


@translates("redux")
def reduce(op: Operation) -> str:
    op.flag("sync")
    mode = op.choice(("add", "min", "max", "and", "or", "xor"))
    kind = op.require("u32", "s32", "b32")
    order = "unsigned_" if kind == "u32" and mode in ("min", "max") else ""
    collective = f"emulator::Collective::reduce_{order}{mode}"
    return op.set(
        0, f"emulator::collective({op.site()}, {collective}, {op.get(2, 'u32')}, {op.get(1, 'u32')})", "u32"
    )


@translates("activemask")
def active_mask(op: Operation) -> str:
    raise PtxError("activemask: which threads are together is up to the GPU, not to the program")
