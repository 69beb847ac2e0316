"""The JavaScript sampler, in Node: its noise and steps without ONNX Runtime, and the commands in ports/ with it."""

import json
import shutil

import numpy as np
import pytest
from helpers import PHILOX_ANSWERS, ROOT, assert_one_line_error

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, export_bundle, pretrained
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.runtime.noise import draw_labels, normal
from ddpm_mlp_pipeline.writers import csv_header
from export.golden import COLUMNS, RUNS

DDPM_JS = ROOT / "ddpm_mlp_pipeline" / "export" / "web" / "ddpm.js"
SAMPLE, SAMPLER = (ROOT / "export" / "ports" / name for name in ("sample.mjs", "sampler.mjs"))


@pytest.fixture
def javascript(run, node):
    """Run a script with ddpm.js as `d` and the content of a file as `input`, and return its JSON output."""

    def javascript(script, given=None):
        head = f"""
            import * as d from {json.dumps(DDPM_JS.as_uri())};
            import {{ readFileSync }} from "node:fs";
            const input = JSON.parse(readFileSync(0, "utf-8"));
            const print = (value) => console.log(JSON.stringify(value));
        """
        result = run(node, "--input-type=module", "-e", head + script, input=json.dumps(given))
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return javascript


def test_philox_gives_the_published_answers(javascript):
    script = """
        const out = new Uint32Array(4);
        print(input.map(([[c0, c1, c2, c3], [k0, k1]]) => {
          d.philox(out, k0, k1, c0, c1, c2, c3);
          return Array.from(out);
        }));
    """
    assert javascript(script, PHILOX_ANSWERS) == [expected for _, _, expected in PHILOX_ANSWERS]


# Seeds of one and two words, beyond doubles; samples and draws that start within a block, and far into the stream.
NOISES = [
    (0, 0, 5, 2, 0),
    (7, 3, 4, 3, 5),
    (2**32 + 5, 0, 3, 1, 2),
    (2**53 + 1, 10, 3, 5, 999),
    (2**63 - 1, 2**32 - 3, 3, 7, 1),
    (123, 0, 2, 784, 50),
]


@pytest.mark.parametrize("arguments", NOISES)
def test_the_noise_is_pythons(javascript, arguments):
    seed, first, num_samples, dimension, draw = arguments
    script = "print(Array.from(d.normal(BigInt(input[0]), ...input.slice(1))))"
    noise = np.array(javascript(script, [str(seed), *arguments[1:]]), dtype=np.float32)
    expected = normal(seed, range(first, first + num_samples), dimension, range(draw, draw + 1))
    np.testing.assert_allclose(noise, expected.ravel(), atol=1e-6, rtol=1e-6)


TENTHS, MNISTS = [0.1] * 10, [n / 60_000 for n in (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)]


@pytest.mark.parametrize("shares", [[1.0], [0.4996, 0.5004], TENTHS, MNISTS, [0.3, 0.0, 0.7, 0.0]])
def test_the_labels_are_pythons(javascript, shares):
    script = """
        const { seed, first, number, shares } = input;
        print(Array.from(d.drawLabels(BigInt(seed), first, number, shares), Number));
    """
    seed, first, number = 2**63 - 1, 2**32 - 3000, 3000
    labels = javascript(script, {"seed": str(seed), "first": first, "number": number, "shares": shares})
    assert labels == draw_labels(seed, range(first, first + number), shares).tolist()
    assert len(set(labels)) == np.count_nonzero(shares)


# A stand-in for ONNX Runtime that returns the golden run's network outputs.
REPLAY = """
    const text = (value) => new TextEncoder().encode(JSON.stringify(value));
    let k = 0;
    class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
    const nan = (row) => row.map((value) => value ?? NaN), further = input.inputs ?? {};
    // The second half of a guided call is told nothing.
    const nulls = { class_labels: input.bundle.null_label, condition: NaN };
    const check = (name, isGuided, { data, dims }) => {
      const given = further[name], values = nan(given.flat()).map(Math.fround); // it has nine digits
      const expected = isGuided ? [...values, ...values.map(() => nulls[name])] : values;
      if (Array.from(data, Number).join() !== expected.join()) throw new Error(`wrong ${name}`);
      const rowShape = Array.isArray(given[0]) ? [given[0].length] : [];
      if (dims.join() !== [expected.length / (rowShape[0] ?? 1), ...rowShape].join()) {
        throw new Error(`wrong shape of ${name}`);
      }
    };
    const run = async ({ sample, timestep, ...others }) => {
      const { eps, output = eps } = input.calls[k], isGuided = output.length > input.num_samples;
      if (Object.keys(others).join() !== Object.keys(further).join()) throw new Error("wrong inputs");
      for (const name of Object.keys(others)) check(name, isGuided, others[name]);
      const shape = [output.length, ...input.bundle.sample_shape];
      if (sample.dims.join() !== shape.join() || timestep.dims.length !== 0) throw new Error("wrong shape");
      if (timestep.data[0] !== input.calls[k].timestep) throw new Error("wrong timestep");
      k++;
      return { out_sample: { data: Float32Array.from(output.flat()) } };
    };
    const session = { inputNames: input.bundle.inputs, outputNames: ["out_sample"], run };
    const files = { "bundle.json": text(input.bundle), "step_table.json": text(input.step_table), "unet.onnx": null };
    const ort = { Tensor, InferenceSession: { create: async () => session } };
    const sampler = await d.openBundle(ort, async (name) => files[name]);
    const calls = [];
    let last;
    const camelCase = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());
    const asked = Object.fromEntries(Object.entries(input.asked ?? {}).map(([name, v]) => [camelCase(name), v]));
    if (asked.known) asked.known = asked.known.map(nan);
    for await (last of sampler.steps(input.num_samples, BigInt(input.seed), 0, asked)) {
      const { x, eps, x0, z, zKnown } = last;
      calls.push({ x, eps, x_0: x0, z, z_known: zKnown });
    }
    const data = sampler.toDataUnits(last.sample), { codec } = sampler;
    const cells = codec ? Array.from({ length: codec.numRows(data) }, (_, row) => codec.texts(data, row)) : null;
    print({ calls, sample: last.sample, data, cells });
"""


def test_the_steps_are_those_of_the_golden_run(javascript, golden_run):
    # The JSON of a typed array is an object with indices as keys.
    def array(entries):
        return np.array(list(entries.values()))

    found = javascript(REPLAY, golden_run)
    for mine, golden in zip(found["calls"], golden_run["calls"], strict=True):
        assert mine.keys() == golden.keys() - {"timestep", "output"}
        for name, values in mine.items():
            np.testing.assert_allclose(array(values), np.ravel(golden[name]), atol=1e-5, err_msg=name)
    for name in ("sample", "data"):
        np.testing.assert_allclose(array(found[name]), np.ravel(golden_run[name]), atol=1e-5)
    assert found["cells"] == golden_run.get("cells")


def test_the_initial_sample_is_scaled(javascript, golden_run):
    golden_run = json.loads(json.dumps(golden_run))
    golden_run["step_table"]["initial_scale"] *= 3  # the golden tables' is 1
    x = javascript(REPLAY, golden_run)["calls"][0]["x"]
    np.testing.assert_allclose(list(x.values()), 3 * np.ravel(golden_run["calls"][0]["x"]), atol=1e-5)


def test_seeds_and_counts_out_of_range_are_refused(javascript):
    script = """
        const outcome = (parse, ...argument) => {
          try { return String(parse(...argument)); } catch (error) { return [error.constructor.name, error.message]; }
        };
        const counts = input.counts.map((text) => outcome(d.parseCount, text, 9));
        print([input.seeds.map((text) => outcome(d.parseSeed, text)), counts]);
    """
    good, bad = ["0", " 7 ", str(2**63 - 1), "007"], ["", "-1", "1.5", "1e3", "0x10", "seven", str(2**63), "9" * 99]
    seeds, counts = javascript(script, {"seeds": good + bad, "counts": ["1", "9", "0", "10", "", "-3", "2.5", "many"]})
    assert seeds[: len(good)] == ["0", "7", str(2**63 - 1), "7"]
    for kind, message in seeds[len(good) :]:
        assert kind == "RangeError"
        assert message.startswith("The seed must be a whole number from 0 to 9223372036854775807, not ")
    assert counts[:2] == ["1", "9"]
    assert all("from 1 to 9" in message for _, message in counts[2:])


def edit(**changes):
    return lambda content: content.update(changes)


def edit_step(k, **changes):
    return lambda content: content["steps"][k].update(changes)


LABELLED, CONDITIONED = (["sample", "timestep", name] for name in ("class_labels", "condition"))
NAN, NINE = float("nan"), [[9, 9, 9, 9]]
DAMAGES = [
    ("step_table.json", edit(version=4), "step_table.json is not of the format ddpm-step-table, version 2 or 3"),
    ("step_table.json", edit(steps=[]), "steps must be a list"),
    ("step_table.json", edit(steps="many"), "steps must be a list"),
    ("step_table.json", edit(initial_scale=0), "initial_scale must be a positive number"),
    ("step_table.json", edit(clip_range="wide"), "clip_range must be a positive number or null"),
    ("step_table.json", edit(clip_range=None), "step 0 uses x_0, but clip_range is null"),
    ("step_table.json", edit_step(3, timestep="soon"), "step 3's timestep"),
    ("step_table.json", edit_step(3, timestep=NAN), "step_table.json is not valid JSON"),  # Python writes NaN, too
    ("step_table.json", edit_step(3, to_x_0=[1]), "step 3's to_x_0 must hold 2 finite numbers"),
    ("step_table.json", edit_step(3, to_next=[]), "step 3's to_next must hold rows of 4"),
    ("step_table.json", edit_step(3, to_next=[[1, 2, 3]]), "step 3's to_next must hold rows of 4"),
    ("step_table.json", edit_step(3, to_next=[[1, 2, 3, None]]), "step 3's to_next must hold rows of 4"),
    ("step_table.json", edit_step(0, to_next=NINE * 2), "step 0 can't use values from before step 0"),
    ("step_table.json", edit_step(3, alpha_cumprod=1.5), "step 3's alpha_cumprod must be a number from 0 to 1"),
    ("step_table.json", edit_step(3, alpha_cumprod=None), "step 3's alpha_cumprod must be a number from 0 to 1"),
    ("step_table.json", edit_step(0, guidance_scale=2), "step 1's guidance_scale must be a finite number"),
    ("step_table.json", edit_step(0, log_variance=[1]), "step 0's log_variance must hold 2 finite numbers"),
    ("bundle.json", edit(format="zip"), "bundle.json is not of the format ddpm-bundle, version 1 or 2"),
    ("bundle.json", edit(sample_shape=[2, 2]), "sample_shape must be [dimension] or [channels, height, width]"),
    ("bundle.json", edit(sample_shape=[0]), "sample_shape must be [dimension] or [channels, height, width]"),
    ("bundle.json", edit(data_mean=[1]), "data_mean must hold 2 finite numbers"),
    ("bundle.json", edit(data_columns=["x"]), "data_columns must hold 2 names"),
    (
        "bundle.json",
        edit(sample_shape=[2**14, 2**7, 2**7]),
        "sample_shape must be [dimension] or [channels, height, width]",
    ),
    ("bundle.json", edit(data_std=[1, 1e39]), "data_std must hold 2 finite numbers"),
    ("bundle.json", edit(inputs=["sample", "timestep", "prompt"]), "the network has the inputs"),
    ("bundle.json", edit(inputs=LABELLED, version=1), "the network has the inputs"),
    ("bundle.json", edit(inputs=[*LABELLED[1:], "sample"]), "the network has the inputs"),
    ("bundle.json", edit(inputs=LABELLED), "class_names must be a list of names"),
    (
        "bundle.json",
        edit(inputs=LABELLED, class_names=["a"], null_label=2),
        "null_label must be a whole number from 0",
    ),
    *(
        (
            "bundle.json",
            edit(inputs=LABELLED, class_names=["a", "b"], null_label=2, class_shares=shares),
            "class_shares must hold 2 numbers that sum to 1",
        )
        for shares in ([1], [1.5, -0.5], [0.5, 0.4], [0.5, None], "halves")
    ),
    ("bundle.json", edit(inputs=CONDITIONED), "condition_columns must be a list of names"),
    ("bundle.json", edit(columns=[]), "columns: columns must be a list of 1 to 65536 columns"),
    ("bundle.json", edit(columns=COLUMNS), "the coordinates of columns are not the data_columns"),
    ("bundle.json", edit(sha256=None), "sha256 must be an object"),
    ("bundle.json", edit(sha256=["unet.onnx"]), "sha256 must be an object"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_bundles_are_refused(javascript, ddim_bundle, name, damage, message):
    content = json.loads((ddim_bundle / name).read_text())
    damage(content)
    script = """
        const parse = input.name === "bundle.json" ? d.parseInfo : d.parseTable;
        try { parse(new TextEncoder().encode(input.text)); print("nothing wrong"); }
        catch (error) { print([error instanceof d.BundleError, error.message]); }
    """
    is_bundle_error, found = javascript(script, {"name": name, "text": json.dumps(content)})
    assert is_bundle_error
    assert message in found
    assert "\n" not in found


OPEN = """
    const session = { inputNames: ["sample", "timestep"], outputNames: ["out_sample"] };
    const ort = { InferenceSession: { create: async () => session } };
    const names = [];
    const read = async (name) => { names.push(name); return readFileSync(`${input}/${name}`); };
    try { await d.openBundle(ort, read); print([names, "nothing wrong"]); }
    catch (error) { print([names, error instanceof d.BundleError ? error.message : error.stack]); }
"""


def test_files_are_read_once_and_compared_with_their_checksums(javascript, ddim_bundle, ddpm_bundle, tmp_path):
    assert javascript(OPEN, str(ddim_bundle)) == [["bundle.json", "step_table.json", "unet.onnx"], "nothing wrong"]
    for name in ("step_table.json", "unet.onnx"):
        folder = shutil.copytree(ddim_bundle, tmp_path / f"damaged-{name}")
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert javascript(OPEN, str(folder))[1].startswith(f"{name} is damaged or from another bundle")
    folder = shutil.copytree(ddim_bundle, tmp_path / "mixed")
    shutil.copy(ddpm_bundle / "step_table.json", folder)
    assert "another bundle" in javascript(OPEN, str(folder))[1]
    info = json.loads((folder / "bundle.json").read_text())
    del info["sha256"]  # the file is optional
    (folder / "bundle.json").write_text(json.dumps(info))
    assert javascript(OPEN, str(folder))[1] == "nothing wrong"


def test_where_browsers_have_no_sha_256_nothing_is_compared(javascript, ddim_bundle, ddpm_bundle, tmp_path):
    folder = shutil.copytree(ddim_bundle, tmp_path / "mixed")
    shutil.copy(ddpm_bundle / "step_table.json", folder)
    plain_http = 'Object.defineProperty(globalThis, "crypto", { value: {} });'
    assert javascript(plain_http + OPEN, str(folder))[1] == "nothing wrong"


def test_csv_is_quoted_and_whole(javascript):
    script = 'print(d.toCsv(Float32Array.of(0.1, -1e-7, 16777217, 3), ["a,b", \'say "x"\']))'
    head, *rows = javascript(script).splitlines()
    assert head == '"a,b","say ""x"""'
    numbers = np.array([row.split(",") for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(numbers, np.array([[0.1, -1e-7], [16777217, 3]], dtype=np.float32))


def test_csv_names_are_quoted_as_in_python(javascript):
    names = ["x", "_y 2", "a,b", 'say "x"', " a", "b ", "a\nb", "c\r", "", "2019", "-1", "1e3", "nan", "INF", "größe"]
    script = "print(d.toCsv(new Float32Array(input.length), input))"
    assert javascript(script, names).startswith(csv_header(names) + "\n0,")


# With onnxruntime-node


@pytest.mark.parametrize("golden_run", [name for name, run in RUNS.items() if not run.asked], indirect=True)
def test_sample_mjs_draws_the_golden_samples(run, node, node_folder, golden_run, golden_bundle):
    argv = (golden_bundle, "--num_samples", golden_run["num_samples"], "--seed", golden_run["seed"])
    result = run(node, SAMPLE, *argv, cwd=node_folder)
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert head == "x,y"
    points = [[float(number) for number in row.split(",")] for row in rows]
    np.testing.assert_allclose(points, golden_run["data"], atol=1e-4)


@pytest.mark.parametrize("batch_size", [7, 512])
def test_sample_mjs_draws_what_python_draws(run, node, node_folder, ddpm_bundle, tmp_path, batch_size):
    argv = ("--num_samples", 50, "--seed", 2**63 - 1, "--batch_size", batch_size, "--output", tmp_path / "points.json")
    assert run(node, SAMPLE, ddpm_bundle, *argv, cwd=node_folder).returncode == 0
    points = np.array(json.loads((tmp_path / "points.json").read_text()))
    np.testing.assert_allclose(points, OnnxSampler(ddpm_bundle).sample(50, seed=2**63 - 1), atol=1e-4)


def test_sample_mjs_draws_images(run, node, node_folder, heart, tmp_path):
    pipeline = DDPMMLPPipeline(MLPModel(3, 8, hidden_dim=32), heart.scheduler)
    pipeline.save_pretrained(tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "ddpm", 5)
    result = run(node, SAMPLE, tmp_path / "bundle", "--num_samples", 3, cwd=node_folder)
    assert result.returncode == 0, result.stderr
    images = np.array(json.loads(result.stdout))
    np.testing.assert_allclose(images, OnnxSampler(tmp_path / "bundle").sample(3), atol=1e-4)


def test_wrong_samplings_end_in_one_line(run, node, node_folder, ddim_bundle, tmp_path):
    names = ("lacking", "damaged", "broken")
    lacking, damaged, broken = (shutil.copytree(ddim_bundle, tmp_path / name) for name in names)
    (lacking / "step_table.json").unlink()
    for folder in (damaged, broken):
        (folder / "unet.onnx").write_bytes((folder / "unet.onnx").read_bytes()[:300])
    seal(broken)
    for argv, fragments in [
        ((), ["usage"]),
        ((ddim_bundle, "--seed", 2**63), ["The seed must be"]),
        ((ddim_bundle, "--seed=-1"), ["The seed must be"]),
        ((ddim_bundle, "--num_samples", 0), ["The number of samples must be"]),
        ((ddim_bundle, "--steps", 3), ["--steps"]),
        ((tmp_path / "nowhere",), ["nowhere is not a bundle", "ENOENT"]),
        ((lacking,), ["step_table.json can't be read"]),
        ((damaged,), ["unet.onnx is damaged"]),
        ((broken,), ["unet.onnx can't be loaded"]),
        ((ddim_bundle, "--output", tmp_path / "none" / "a.csv"), ["ENOENT"]),
        ((ddim_bundle, "--output", lacking / "bundle.json"), ["bundle.json exists: pass --overwrite to replace it"]),
    ]:
        assert_one_line_error(run(node, SAMPLE, *argv, cwd=node_folder), *fragments)
    assert_one_line_error(run(node, SAMPLE, ddim_bundle, cwd=tmp_path), "npm install onnxruntime-node")


def test_sampler_mjs_runs_the_whole_sampler(run, node, node_folder, tmp_path):
    seed = 2**63 - 1
    export_bundle(pretrained("heart"), tmp_path / "bundle", "ddpm", 10, sampler="float32")
    result = run(node, SAMPLER, tmp_path / "bundle" / "sampler.onnx", 20, seed, cwd=node_folder)
    assert result.returncode == 0, result.stderr
    samples = json.loads(result.stdout)
    assert samples["shape"] == [20, 2]
    expected = OnnxSampler(tmp_path / "bundle").sample(20, seed)
    np.testing.assert_allclose(np.reshape(samples["data"], (20, 2)), expected, atol=1e-4)
