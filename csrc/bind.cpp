// The Python face of saek.h: module sae_ext._C. The one file that knows Python.
//
// Pointers arrive as integers (Tensor.data_ptr(), 0 for none); the caller keeps the tensors alive and has
// checked their shapes. Groups of arguments arrive as tuples in the order of their C structs. The GIL is
// released while a kernel runs. Error codes become ValueError, unless the function returns its code.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "saek.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using Int = std::int64_t;
using Exec = std::tuple<int, int, int, Pointer, Pointer>;     // device, dtype, threads, stream, skip
using Code = std::tuple<Pointer, Pointer, Pointer, Int>;      // row_ptr, col, val, rows
using Out = std::tuple<Pointer, Pointer, Pointer, Int, Pointer>; // row_ptr, col, val, capacity, counters
// feature_ptr, row, z, dz, long_lists, slots
using Entries = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Int>;
// entries, grad, xc, dW_enc, dW_dec, grad_b_enc, pull, W_dec, long_rows, d_in, d_sae
using Gradient =
    std::tuple<Entries, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Int, Int>;
using Adam = std::array<Pointer, 2>;                          // numbers, grad_scale
using Moments = std::array<Pointer, 3>;

template <class T = void>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

saek_code code_of(const Code& c) {
  const auto& [row_ptr, col, val, rows] = c;
  return {at<const Int>(row_ptr), at<const std::int32_t>(col), at(val), rows};
}

saek_code_out out_of(const Out& o) {
  const auto& [row_ptr, col, val, capacity, counters] = o;
  return {at<Int>(row_ptr), at<std::int32_t>(col), at(val), capacity, at<Int>(counters)};
}

saek_gradient gradient_of(const Gradient& g) {
  const auto& [entries, grad, xc, dW_enc, dW_dec, grad_b_enc, pull, W_dec, long_rows, d_in, d_sae] = g;
  const auto& [feature_ptr, row, z, dz, long_lists, slots] = entries;
  return {{at<const Int>(feature_ptr), at<const std::int32_t>(row), at(z), at(dz),
           at<const std::int32_t>(long_lists), slots},
          at(grad), at(xc), at(dW_enc), at(dW_dec), at(grad_b_enc), at(pull), at(W_dec), at(long_rows),
          d_in, d_sae};
}

saek_adam adam_of(const Adam& a) { return {at<const saek_adam_numbers>(a[0]), at<const double>(a[1])}; }

saek_moments moments_of(const Moments& p) { return {at(p[0]), at(p[1]), at(p[2])}; }

void check(const char* function, int code) {
  if (code == SAEK_OK) return;
  std::string words = std::string(function) + ": " + saek_error_string(code);
  if (code == SAEK_CUDA_FAILED) throw std::runtime_error(words + ": " + saek_cuda_error());
  throw py::value_error(words);
}

// Calls a function of saek.h without the GIL. SAEK_OVERFLOW is an answer, as are others of saek_screen.
template <class Args>
int call(const char* name, int (*function)(const saek_exec*, const Args*), const Exec& exec,
         const Args& args) {
  constexpr bool screens = std::is_same_v<Args, saek_screen_args>;
  const auto& [device, dtype, threads, stream, skip] = exec;
  const saek_exec where{device, dtype, threads, at(stream), at<const Int>(skip)};
  int code;
  {
    py::gil_scoped_release release;
    code = function(&where, &args);
  }
  if (code != SAEK_OVERFLOW && !(screens && (code == SAEK_TOO_DENSE || code == SAEK_UNSUPPORTED)))
    check(name, code);
  return code;
}

std::string isa() {
  const char* name = saek_isa();
  if (name == nullptr) check("isa", SAEK_BAD_ISA);
  return name;
}

py::dict cuda() {
  int devices = 0, driver = 0, runtime = 0;
  const int code = saek_cuda_count(&devices, &driver, &runtime);
  py::list found;
  for (int i = 0; i < devices; ++i) {
    saek_cuda_device d{};
    check("cuda", saek_cuda_describe(i, &d));
    py::dict one;
    one["name"] = d.name;
    one["capability"] = std::to_string(d.major) + "." + std::to_string(d.minor);
    one["memory_bytes"] = d.memory_bytes;
    found.append(one);
  }
  py::dict out;
  out["built"] = code != SAEK_NO_CUDA;
  out["devices"] = found;
  out["driver_version"] = driver;
  out["runtime_version"] = runtime;
  out["reason"] = code == SAEK_OK ? py::object(py::none()) : py::object(py::str(saek_error_string(code)));
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Sparsemill's compiled kernels; sae_ext.ops is their public face, saek.h their contract.";
  using py::arg;
  const py::kw_only named;

  m.attr("FLOAT32") = static_cast<int>(SAEK_FLOAT32);
  m.attr("FLOAT64") = static_cast<int>(SAEK_FLOAT64);
  m.attr("BFLOAT16") = static_cast<int>(SAEK_BFLOAT16);
  m.attr("CPU") = static_cast<int>(SAEK_CPU);
  m.attr("CUDA") = static_cast<int>(SAEK_CUDA);
  m.attr("OK") = static_cast<int>(SAEK_OK);
  m.attr("OVERFLOW") = static_cast<int>(SAEK_OVERFLOW);
  m.attr("UNSUPPORTED") = static_cast<int>(SAEK_UNSUPPORTED);
  m.attr("TOO_SHORT") = static_cast<int>(SAEK_TOO_SHORT);
  m.attr("NOT_FINITE") = static_cast<int>(SAEK_NOT_FINITE);
  m.attr("TOO_DENSE") = static_cast<int>(SAEK_TOO_DENSE);
  m.attr("B_DEC_SHARES") = static_cast<int>(SAEK_B_DEC_SHARES);
  m.attr("LONG_LIST") = static_cast<int>(SAEK_LONG_LIST);
  m.attr("SHARED_ROW") = static_cast<int>(SAEK_SHARED_ROW);

  m.def("isa", &isa, "Instruction set in use: avx512vnni, avx512, avx2 or portable.");
  m.def("has_openmp", [] { return saek_has_openmp() != 0; }, "Whether the loops use threads.");
  m.def("cuda", &cuda, "What the CUDA runtime sees, and why there is nothing where there is nothing.");

  m.def(
      "compact",
      [](const Exec& exec, Pointer pre, Pointer b_enc, double clip, Int rows, Int d_sae, Pointer mask,
         Pointer counts, const Out& out) {
        return call("compact", saek_compact, exec,
                    {at(pre), at(b_enc), clip, rows, d_sae, at<std::uint64_t>(mask),
                     at<std::int32_t>(counts), out_of(out)});
      },
      named, arg("exec"), arg("pre"), arg("b_enc"), arg("clip"), arg("rows"), arg("d_sae"), arg("mask"),
      arg("counts"), arg("out"), "List the active entries of a chunk of rows; OK or OVERFLOW.");
  m.def("screen_scratch", &saek_screen_scratch, named, arg("rows"), arg("d_in"), arg("d_sae"),
        arg("threads"), "Bytes of scratch memory that screen needs.");
  m.def(
      "screen",
      [](const Exec& exec, Pointer xc, Pointer W_enc, Pointer b_enc, double clip, Int rows, Int d_in,
         Int d_sae, double limit, Pointer scratch, Pointer list_col, Pointer list_val, const Out& out) {
        return call("screen", saek_screen, exec,
                    {at(xc), at(W_enc), at(b_enc), clip, rows, d_in, d_sae, limit, at(scratch),
                     at<std::int32_t>(list_col), at(list_val), out_of(out)});
      },
      named, arg("exec"), arg("xc"), arg("W_enc"), arg("b_enc"), arg("clip"), arg("rows"), arg("d_in"),
      arg("d_sae"), arg("limit"), arg("scratch"), arg("list_col"), arg("list_val"), arg("out"),
      "List the active entries of rows by way of an 8-bit bound; OK, OVERFLOW, TOO_DENSE or UNSUPPORTED.");
  m.def(
      "gather",
      [](const Exec& exec, Pointer support_ptr, Pointer support_col, Pointer xc, Pointer W_enc,
         Pointer b_enc, double clip, Int rows, Int d_in, Int support_length, Pointer scratch,
         Pointer counts, const Out& out) {
        return call("gather", saek_gather, exec,
                    {at<const Int>(support_ptr), at<const std::int32_t>(support_col), at(xc), at(W_enc),
                     at(b_enc), clip, rows, d_in, support_length, at(scratch), at<std::int32_t>(counts),
                     out_of(out)});
      },
      named, arg("exec"), arg("support_ptr"), arg("support_col"), arg("xc"), arg("W_enc"), arg("b_enc"),
      arg("clip"), arg("rows"), arg("d_in"), arg("support_length"), arg("scratch"), arg("counts"), arg("out"),
      "List the active entries of a given support; OK or OVERFLOW.");
  m.def(
      "decode",
      [](const Exec& exec, const Code& code, Pointer matrix, Pointer bias, Int d_in, Pointer out) {
        return call("decode", saek_decode, exec, {code_of(code), at(matrix), at(bias), d_in, at(out)});
      },
      named, arg("exec"), arg("code"), arg("matrix"), arg("bias"), arg("d_in"),
      arg("out"), "Weighted sums of a matrix's rows, one for each row of a code.");
  m.def(
      "residual",
      [](const Exec& exec, const Code& code, Pointer W_dec, Pointer x, Pointer b_dec, Pointer recon_weight,
         Pointer l1_weight, Pointer feature_weight, double recon_scale, Pointer l1_scale, Int d_in,
         Int shared_bytes, Pointer halt, Pointer row_sums, Pointer grad, Pointer dz, Pointer sums) {
        return call("residual", saek_residual, exec,
                    {code_of(code), at(W_dec), at(x), at(b_dec), at(recon_weight), at(l1_weight),
                     at(feature_weight), recon_scale, at<const double>(l1_scale), d_in, shared_bytes,
                     at<Int>(halt), at<double>(row_sums), at(grad), at(dz), at<double>(sums)});
      },
      named, arg("exec"), arg("code"), arg("W_dec"), arg("x"), arg("b_dec"), arg("recon_weight"),
      arg("l1_weight"), arg("feature_weight"), arg("recon_scale"), arg("l1_scale"), arg("d_in"),
      arg("shared_bytes"), arg("halt"), arg("row_sums"), arg("grad"), arg("dz"), arg("sums"), "Residual, loss and both gradients of each row.");
  m.def(
      "dz",
      [](const Exec& exec, const Code& code, Pointer W_dec, Pointer grad, Pointer grad_l1,
         Pointer feature_weight, Pointer grad_activity, Pointer grad_val, Int d_in, Pointer dz) {
        return call("dz", saek_dz, exec,
                    {code_of(code), at(W_dec), at(grad), at(grad_l1), at(feature_weight),
                     at(grad_activity), at(grad_val), d_in, at(dz)});
      },
      named, arg("exec"), arg("code"), arg("W_dec"), arg("grad"), arg("grad_l1"), arg("feature_weight"),
      arg("grad_activity"), arg("grad_val"), arg("d_in"), arg("dz"),
      "Gradients of the listed entries from gradients of what was made of them.");
  m.def(
      "transpose",
      [](const Exec& exec, const Code& code, Pointer dz, Pointer row_weight, Int d_sae, Pointer counts,
         const Entries& entries, Pointer grad_b_enc, Pointer z_sum) {
        const auto& [feature_ptr, row, z, dz_by_feature, long_lists, slots] = entries;
        return call("transpose", saek_transpose, exec,
                    {code_of(code), at(dz), at(row_weight), d_sae, at<Int>(counts),
                     at<std::int32_t>(long_lists), slots, at<Int>(feature_ptr), at<std::int32_t>(row), at(z),
                     at(dz_by_feature), at(grad_b_enc), at(z_sum)});
      },
      named, arg("exec"), arg("code"), arg("dz"), arg("row_weight"), arg("d_sae"), arg("counts"),
      arg("entries"), arg("grad_b_enc"), arg("z_sum"), "Order the entries by feature; sum dz and z.");
  m.def(
      "b_dec_gradient",
      [](const Exec& exec, Pointer grad, Pointer grad_b_enc, Pointer W_enc, Int rows, Int d_in, Int d_sae,
         Pointer scratch, Pointer out) {
        return call("b_dec_gradient", saek_b_dec_gradient, exec,
                    {at(grad), at(grad_b_enc), at(W_enc), rows, d_in, d_sae, at<double>(scratch), at(out)});
      },
      named, arg("exec"), arg("grad"), arg("grad_b_enc"), arg("W_enc"), arg("rows"), arg("d_in"),
      arg("d_sae"), arg("scratch"), arg("out"), "Gradient of b_dec.");
  m.def(
      "feature_gradients",
      [](const Exec& exec, const Gradient& gradient, Pointer dW_enc, Pointer dW_dec) {
        return call("feature_gradients", saek_feature_gradients, exec,
                    {gradient_of(gradient), at(dW_enc), at(dW_dec)});
      },
      named, arg("exec"), arg("gradient"), arg("dW_enc"), arg("dW_dec"), "Gradients of W_enc and W_dec.");
  m.def(
      "feature_norms",
      [](const Exec& exec, const Gradient& gradient, Pointer dW_enc, Pointer dW_dec, Pointer out) {
        return call("feature_norms", saek_feature_norms, exec,
                    {gradient_of(gradient), at(dW_enc), at(dW_dec), at<double>(out)});
      },
      named, arg("exec"), arg("gradient"), arg("dW_enc"), arg("dW_dec"), arg("out"),
      "Squared length of each feature's gradients.");
  m.def(
      "update_features",
      [](const Exec& exec, const Gradient& gradient, const Adam& adam, bool unit_norm, Pointer scratch,
         const Moments& W_enc, const Moments& b_enc, const Moments& W_dec, Pointer W_enc_copy,
         Pointer W_dec_copy) {
        return call("update_features", saek_update_features, exec,
                    {gradient_of(gradient), adam_of(adam), unit_norm, at(scratch), moments_of(W_enc),
                     moments_of(b_enc), moments_of(W_dec), at(W_enc_copy), at(W_dec_copy)});
      },
      named, arg("exec"), arg("gradient"), arg("adam"), arg("unit_norm"), arg("scratch"), arg("W_enc"),
      arg("b_enc"), arg("W_dec"), arg("W_enc_copy"), arg("W_dec_copy"), "Gradients, projection, Adam and renormalisation of every feature.");
  m.def(
      "update",
      [](const Exec& exec, Pointer gradient, Int n, const Adam& adam, const Moments& parameter) {
        return call("update", saek_update, exec, {at(gradient), n, adam_of(adam), moments_of(parameter)});
      },
      named, arg("exec"), arg("gradient"), arg("n"), arg("adam"), arg("parameter"),
      "Adam for one other parameter.");
  m.def(
      "row_norms",
      [](const Exec& exec, Pointer matrix, Int rows, Int d_in, Pointer out) {
        return call("row_norms", saek_row_norms, exec, {at(matrix), rows, d_in, at(out)});
      },
      named, arg("exec"), arg("matrix"), arg("rows"), arg("d_in"), arg("out"), "Length of each row.");
  m.def(
      "dense_activate",
      [](const Exec& exec, Pointer pre, Pointer b_enc, double clip, Pointer row_weight, Int rows, Int d_sae,
         Pointer passes, Pointer fired, Pointer saturated, Pointer z_sum, Pointer scratch) {
        return call("dense_activate", saek_dense_activate, exec,
                    {at(pre), at(b_enc), clip, at(row_weight), rows, d_sae, at<std::uint64_t>(passes),
                     at<Int>(fired), at<Int>(saturated), at<double>(z_sum), at<double>(scratch)});
      },
      named, arg("exec"), arg("pre"), arg("b_enc"), arg("clip"), arg("row_weight"), arg("rows"),
      arg("d_sae"), arg("passes"), arg("fired"), arg("saturated"), arg("z_sum"),
      arg("scratch"),
      "Pre-activations become activations in place.");
  m.def(
      "dense_residual",
      [](const Exec& exec, Pointer grad, Pointer x, Pointer b_dec, Pointer recon_weight, double recon_scale,
         Int rows, Int d_in, Pointer halt, Pointer row_sums, Pointer sums) {
        return call("dense_residual", saek_dense_residual, exec,
                    {at(grad), at(x), at(b_dec), at(recon_weight), recon_scale, rows, d_in, at<Int>(halt),
                     at<double>(row_sums), at<double>(sums)});
      },
      named, arg("exec"), arg("grad"), arg("x"), arg("b_dec"), arg("recon_weight"), arg("recon_scale"),
      arg("rows"), arg("d_in"), arg("halt"), arg("row_sums"), arg("sums"), "Reconstructions become gradients in place.");
  m.def(
      "dense_mask",
      [](const Exec& exec, Pointer dz, Pointer passes, Pointer l1_weight, Pointer feature_weight,
         Pointer l1_scale, Int rows, Int d_sae, Pointer grad_b_enc, Pointer scratch) {
        return call("dense_mask", saek_dense_mask, exec,
                    {at(dz), at<const std::uint64_t>(passes), at(l1_weight), at(feature_weight),
                     at<const double>(l1_scale), rows, d_sae, at<double>(grad_b_enc), at<double>(scratch)});
      },
      named, arg("exec"), arg("dz"), arg("passes"), arg("l1_weight"), arg("feature_weight"),
      arg("l1_scale"), arg("rows"), arg("d_sae"), arg("grad_b_enc"), arg("scratch"),
      "Gradients of activations become gradients of pre-activations in place.");
}
