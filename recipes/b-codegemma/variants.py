"""The caret example of the README, and 29 like it: what was imported, by what is done with it below.

The model has seen the names in other places; none of these files is among those that it was trained on, which
`tests/unit/test_recipes.py` checks.
"""

from __future__ import annotations

PREFIX = "import "

VARIANTS = {
    "sys": '\nif __name__ == "__main__":\n    sys.exit(0)',
    "os": '\nfor name in sorted(os.listdir("data")):\n    print(name)',
    "re": '\n\nif re.search("gem+a", answer):\n    print("found it")',
    "json": '\n\nprint(json.dumps({"answer": 42}))',
    "time": "\n\nbegan = time.perf_counter()\nprint(began)",
    "math": "\n\ndef area(radius):\n    return math.pi * radius ** 2",
    "random": '\n\nprint(random.choice(["red", "green", "blue"]))',
    "struct": '\n\nheader = struct.unpack("<IHH", data[:8])',
    "socket": '\n\nhost = socket.gethostname()\nprint("on", host)',
    "threading": "\n\nworker = threading.Thread(target=work, daemon=True)\nworker.start()",
    "subprocess": '\n\ndone = subprocess.run(["ls", "-l"], check=True)',
    "shutil": '\n\nshutil.copyfile("here.txt", "there.txt")',
    "tempfile": "\n\nwith tempfile.TemporaryDirectory() as folder:\n    print(folder)",
    "logging": '\n\nlog = logging.getLogger("gems")\nlog.info("ready")',
    "datetime": "\n\ntoday = datetime.date.today()\nprint(today.year)",
    "functools": "\n\n@functools.lru_cache(maxsize=8)\ndef square(x):\n    return x * x",
    "itertools": '\n\nfor pair in itertools.product("ab", "cd"):\n    print(pair)',
    "collections": '\n\ncounts = collections.Counter("mississippi")\nprint(counts)',
    "string": "\n\nalphabet = string.ascii_lowercase[:13]",
    "textwrap": "\n\nprint(textwrap.fill(story, width=60))",
    "hashlib": '\n\ndigest = hashlib.sha256(b"gem").hexdigest()',
    "pickle": '\n\nwith open("gems.bin", "rb") as file:\n    gems = pickle.load(file)',
    "csv": '\n\nfor row in csv.reader(lines, delimiter=";"):\n    print(row[0])',
    "glob": '\n\npictures = glob.glob("pictures/*.png")',
    "copy": '\n\nother = copy.deepcopy(settings)\nother["side"] = 3',
    "argparse": '\n\nparser = argparse.ArgumentParser(description="Count gems.")',
    "io": '\n\nbuffer = io.BytesIO(b"gems")\nprint(buffer.read(2))',
    "types": "\n\nplace = types.SimpleNamespace(x=1, y=2)",
    "unittest": "\n\nclass TestGems(unittest.TestCase):\n    pass",
    "inspect": "\n\nprint(inspect.signature(area).parameters)",
}
