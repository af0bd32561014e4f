// The Python face of saek.h: module sae_ext._C. The one file that knows Python.
//
// Pointers arrive as integers (Tensor.data_ptr()); the caller keeps the tensors alive and has
// checked their shapes. The GIL is released while a kernel runs. Error codes become ValueError.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "saek.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using Code = std::tuple<Pointer, Pointer, Pointer, std::int64_t>;  // row_ptr, col, val, rows
using Adam = std::tuple<double, double, double, double, std::int64_t>;
using Moments = std::array<Pointer, 3>;

template <class T = void>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

saek_code code_of(const Code& c) {
  return {at<const std::int64_t>(std::get<0>(c)), at<const std::int32_t>(std::get<1>(c)),
          at(std::get<2>(c)), std::get<3>(c)};
}

saek_adam adam_of(const Adam& a) {
  return {std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a), std::get<4>(a)};
}

saek_moments moments_of(const Moments& p) { return {at(p[0]), at(p[1]), at(p[2])}; }

void check(const char* function, int code) {
  if (code != SAEK_OK) throw py::value_error(std::string(function) + ": " + saek_error_string(code));
}

std::string isa() {
  const char* name = saek_isa();
  if (name == nullptr) check("isa", SAEK_BAD_ISA);
  return name;
}

std::tuple<std::int64_t, std::int64_t> compact(int dtype, Pointer pre, Pointer b_enc, double clip,
                                               std::int64_t rows, std::int64_t d_sae,
                                               std::int64_t capacity, int threads, Pointer mask,
                                               Pointer row_ptr, Pointer col, Pointer val) {
  saek_compact_args a{};
  a.pre = at(pre);
  a.b_enc = at(b_enc);
  a.clip = clip;
  a.rows = rows;
  a.d_sae = d_sae;
  a.capacity = capacity;
  a.threads = threads;
  a.mask = at<std::uint64_t>(mask);
  a.row_ptr = at<std::int64_t>(row_ptr);
  a.col = at<std::int32_t>(col);
  a.val = at(val);
  int code;
  {
    py::gil_scoped_release release;
    code = saek_compact(dtype, &a);
  }
  if (code != SAEK_OVERFLOW) check("compact", code);
  return {a.needed, a.saturated};
}

void decode(int dtype, const Code& code, Pointer W_dec, Pointer b_dec, std::int64_t d_in,
            int threads, Pointer out) {
  const saek_decode_args a{code_of(code), at(W_dec), at(b_dec), d_in, threads, at(out)};
  int status;
  {
    py::gil_scoped_release release;
    status = saek_decode(dtype, &a);
  }
  check("decode", status);
}

std::tuple<double, double> residual(int dtype, const Code& code, Pointer W_dec, Pointer xc,
                                    Pointer recon_weight, Pointer l1_weight, double recon_scale,
                                    double l1_scale, std::int64_t d_in, int threads,
                                    Pointer row_partials, Pointer grad, Pointer dz) {
  saek_residual_args a{};
  a.code = code_of(code);
  a.W_dec = at(W_dec);
  a.xc = at(xc);
  a.recon_weight = at(recon_weight);
  a.l1_weight = at(l1_weight);
  a.recon_scale = recon_scale;
  a.l1_scale = l1_scale;
  a.d_in = d_in;
  a.threads = threads;
  a.row_partials = at<double>(row_partials);
  a.grad = at(grad);
  a.dz = at(dz);
  int status;
  {
    py::gil_scoped_release release;
    status = saek_residual(dtype, &a);
  }
  check("residual", status);
  return {a.squared_error, a.l1};
}

void transpose(int dtype, const Code& code, Pointer dz, std::int64_t d_sae, int threads,
               Pointer counts, Pointer feature_ptr, Pointer row, Pointer z, Pointer dz_by_feature,
               Pointer grad_b_enc) {
  const saek_transpose_args a{code_of(code),
                              at(dz),
                              d_sae,
                              threads,
                              at<std::int64_t>(counts),
                              at<std::int64_t>(feature_ptr),
                              at<std::int32_t>(row),
                              at(z),
                              at(dz_by_feature),
                              at(grad_b_enc)};
  int status;
  {
    py::gil_scoped_release release;
    status = saek_transpose(dtype, &a);
  }
  check("transpose", status);
}

void update_b_dec(int dtype, Pointer grad, Pointer grad_b_enc, Pointer W_enc, std::int64_t rows,
                  std::int64_t d_in, std::int64_t d_sae, int threads, const Adam& adam,
                  const Moments& b_dec) {
  const saek_b_dec_args a{at(grad), at(grad_b_enc), at(W_enc),     rows,             d_in,
                          d_sae,    threads,        adam_of(adam), moments_of(b_dec)};
  int status;
  {
    py::gil_scoped_release release;
    status = saek_update_b_dec(dtype, &a);
  }
  check("update_b_dec", status);
}

void update_features(int dtype, Pointer feature_ptr, Pointer row, Pointer z, Pointer dz,
                     std::int64_t d_sae, Pointer grad, Pointer xc, Pointer grad_b_enc,
                     std::int64_t d_in, int threads, const Adam& adam, Pointer scratch,
                     const Moments& W_enc, const Moments& b_enc, const Moments& W_dec) {
  const saek_by_feature entries{at<const std::int64_t>(feature_ptr), at<const std::int32_t>(row),
                                at(z), at(dz), d_sae};
  const saek_features_args a{entries,       at(grad),          at(xc),           at(grad_b_enc),
                             d_in,          threads,           adam_of(adam),    at(scratch),
                             moments_of(W_enc), moments_of(b_enc), moments_of(W_dec)};
  int status;
  {
    py::gil_scoped_release release;
    status = saek_update_features(dtype, &a);
  }
  check("update_features", status);
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
  m.def("isa", &isa, "Instruction set in use: avx512, avx2 or portable.");
  m.def("has_openmp", [] { return saek_has_openmp() != 0; }, "Whether the loops use threads.");
  m.def("cuda", &cuda, "What the CUDA runtime sees, and why there is nothing where there is nothing.");
  m.def("compact", &compact, named, arg("dtype"), arg("pre"), arg("b_enc"), arg("clip"), arg("rows"),
        arg("d_sae"), arg("capacity"), arg("threads"), arg("mask"), arg("row_ptr"), arg("col"),
        arg("val"),
        "List one chunk's active entries; returns (needed, saturated). Where needed > capacity, "
        "nothing was listed.");
  m.def("decode", &decode, named, arg("dtype"), arg("code"), arg("W_dec"), arg("b_dec"), arg("d_in"),
        arg("threads"), arg("out"), "Reconstruct rows from their active entries.");
  m.def("residual", &residual, named, arg("dtype"), arg("code"), arg("W_dec"), arg("xc"),
        arg("recon_weight"), arg("l1_weight"), arg("recon_scale"), arg("l1_scale"), arg("d_in"),
        arg("threads"), arg("row_partials"), arg("grad"), arg("dz"),
        "Residual and gradients of each row; returns (squared_error, l1).");
  m.def("transpose", &transpose, named, arg("dtype"), arg("code"), arg("dz"), arg("d_sae"),
        arg("threads"), arg("counts"), arg("feature_ptr"), arg("row"), arg("z"),
        arg("dz_by_feature"), arg("grad_b_enc"), "Order the entries by feature and sum dz.");
  m.def("update_b_dec", &update_b_dec, named, arg("dtype"), arg("grad"), arg("grad_b_enc"),
        arg("W_enc"), arg("rows"), arg("d_in"), arg("d_sae"), arg("threads"), arg("adam"),
        arg("b_dec"), "Gradient and Adam update of b_dec.");
  m.def("update_features", &update_features, named, arg("dtype"), arg("feature_ptr"), arg("row"),
        arg("z"), arg("dz"), arg("d_sae"), arg("grad"), arg("xc"), arg("grad_b_enc"), arg("d_in"),
        arg("threads"), arg("adam"), arg("scratch"), arg("W_enc"), arg("b_enc"), arg("W_dec"),
        "Gradients, projection, Adam and renormalisation of every feature's weights.");
}
