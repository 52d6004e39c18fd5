"""Reads the PTX that nvcc writes: kernels as lists of instructions and labels, module variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Bits of every scalar type.
BITS = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
}


class PtxError(Exception):
    """Something in the PTX that the emulator does not know."""


@dataclass
class Variable:
    space: str
    name: str
    size: int | None  # bytes; None: dynamic shared memory
    alignment: int
    initial: bytes = b""


@dataclass
class Instruction:
    text: str
    file: str
    line: int
    guard: str  # "", "%p1" or "!%p1"
    opcode: str
    operands: list[str]


@dataclass
class Label:
    name: str


@dataclass
class Kernel:
    name: str
    parameters: list[str]
    max_threads: int
    cluster_size: int
    registers: dict[str, int] = field(default_factory=dict)  # name: bits
    variables: list[Variable] = field(default_factory=list)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    body: list[Instruction | Label] = field(default_factory=list)


@dataclass
class Module:
    variables: list[Variable]
    kernels: list[Kernel]


def split_operands(text: str) -> list[str]:
    """At the commas outside brackets: `{%r1, %r2}, [%rd1+4]` are two."""
    operands, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            operands.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*operands, last] if last else operands


ENTRY = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.func\s[^{;]*")
TO_LINE_END = re.compile(r"\.(version|target|address_size|file|loc|pragma)\b([^\n]*)\n")
LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
STATEMENT = re.compile(r"([^;]*);")
SPACE = re.compile(r"\s*")
VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*(.*))?",
    re.DOTALL,
)
REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+(.*)", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
TOOLKIT = re.compile(r"/targets/[^/]+/include/")
NAME = re.compile(r"[%\w$]+")


def parse_variable(statement: str) -> Variable | None:
    match = VARIABLE.fullmatch(statement)
    if match is None:
        return None
    space, alignment, kind, name, count, initial = match.groups()
    width = BITS[kind] // 8
    total = None if count == "" else width * int(count or 1)
    return Variable(space, name, total, int(alignment or width), parse_initial(initial, width))


def parse_initial(text: str | None, width: int) -> bytes:
    if text is None:
        return b""
    try:
        numbers = [int(word, 0) for word in split_operands(text.strip().strip("{}"))]
    except ValueError:
        raise PtxError(f"initial value {text}") from None
    return b"".join((number & ((1 << 8 * width) - 1)).to_bytes(width, "little") for number in numbers)


def product(directive: str, directives: str) -> int:
    """Of the numbers of a directive such as `.maxntid 256, 1, 1`; 0 where it is absent."""
    match = re.search(rf"\.{directive}\s+([\d,\s]+)", directives)
    if match is None:
        return 0
    result = 1
    for number in re.findall(r"\d+", match[1]):
        result *= int(number)
    return result


class Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        self.text = re.sub(r"\.section\s+\S+\s*\{.*?\}", "", text, flags=re.DOTALL)  # debug information
        self.position = 0
        self.file, self.line = "?", 0
        self.files = {int(n): name for n, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self.text)}

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.position)
        if match is not None:
            self.position = match.end()
        return match

    def statements(self) -> Iterator[str]:
        """Statements without semicolons, labels with their colon, "{" and "}", to the end of the text."""
        while True:
            self.take(SPACE)
            if self.position == len(self.text):
                return
            if match := self.take(TO_LINE_END):
                if match[1] == "loc":
                    self.locate(match[2])
            elif self.text[self.position] in "{}":
                self.position += 1
                yield self.text[self.position - 1]
            elif match := self.take(LABEL):
                yield f"{match[1]}:"
            elif match := self.take(STATEMENT):
                yield " ".join(match[1].split())
            else:
                raise PtxError(f"text after the last statement: {self.text[self.position :][:80]}")

    def locate(self, text: str) -> None:
        """From `file line column, function_name ..., inlined_at file line column`."""
        places = re.findall(r"(?:^|inlined_at)\s+(\d+)\s+(\d+)", text)
        for file, line in places:
            self.file, self.line = self.files.get(int(file), "?"), int(line)
            if not TOOLKIT.search(self.file):  # else where the toolkit's header was called
                return

    def module(self) -> Module:
        module = Module([], [])
        while True:
            self.take(SPACE)
            if self.position == len(self.text):
                return module
            if match := self.take(ENTRY):
                module.kernels.append(self.kernel(*match.groups()))
            elif match := self.take(FUNCTION):
                raise PtxError(f"a device function that was not inlined: {' '.join(match[0].split())}")
            elif self.take(TO_LINE_END) is None:
                statement = self.take(STATEMENT)
                if statement is None:
                    raise PtxError(f"text after the last kernel: {self.text[self.position :][:80]}")
                variable = parse_variable(" ".join(statement[1].split()))
                if variable is None:
                    raise PtxError(f"directive {statement[1]}")
                module.variables.append(variable)

    def kernel(self, name: str, parameters: str | None, directives: str) -> Kernel:
        names = [re.sub(r"\[\d+\]$", "", word).split()[-1] for word in split_operands(parameters or "")]
        kernel = Kernel(
            name, names, product("maxntid", directives), product("reqnctapercluster", directives) or 1
        )
        scopes = Scopes(kernel.registers)
        target_list = None
        for statement in self.statements():
            if statement == "{":
                scopes.enter()
            elif statement == "}":
                if not scopes.leave():
                    return kernel
            elif statement.endswith(":"):
                target_list = statement[:-1]
                kernel.body.append(Label(target_list))
            elif statement.startswith(".branchtargets"):
                kernel.branch_targets[str(target_list)] = split_operands(statement.split(None, 1)[1])
            elif match := REGISTERS.fullmatch(statement):
                scopes.declare(match[1], split_operands(match[2]))
            elif variable := parse_variable(statement):
                kernel.variables.append(variable)
            elif match := INSTRUCTION.fullmatch(scopes.rename(statement)):
                operands = split_operands(match[3])
                kernel.body.append(
                    Instruction(statement, self.file, self.line, match[1] or "", match[2], operands)
                )
            else:
                raise PtxError(f"{name}: statement {statement}")
        raise PtxError(f"{name}: no end")


class Scopes:
    """Registers by scope: inline assembly declares the same name again and again, with types of its own."""

    def __init__(self, registers: dict[str, int]) -> None:
        self.registers = registers
        self.renamed: list[dict[str, str]] = [{}]

    def enter(self) -> None:
        self.renamed.append(dict(self.renamed[-1]))

    def leave(self) -> bool:
        self.renamed.pop()
        return bool(self.renamed)

    def declare(self, kind: str, words: list[str]) -> None:
        for word in words:
            if match := re.fullmatch(r"(%?[\w$]+)<(\d+)>", word):
                for index in range(int(match[2])):
                    self.registers[f"{match[1]}{index}"] = BITS[kind]
                continue
            unique = word
            if word in self.registers:
                unique = f"{word}__{len(self.registers)}"
                self.renamed[-1][word] = unique
            self.registers[unique] = BITS[kind]

    def rename(self, statement: str) -> str:
        names = self.renamed[-1]
        if not names:
            return statement
        return NAME.sub(lambda match: names.get(match[0], match[0]), statement)


def parse(text: str) -> Module:
    return Parser(text).module()
