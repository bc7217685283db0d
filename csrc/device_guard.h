// Which device is current while a kernel is launched. For the CUDA sources alone.
#pragma once

namespace ospo {

// Makes `device` current, and the one before it again at the end of the scope. Where `status` is an error, nothing was
// changed and nothing may be launched.
class OnDevice {
   public:
    explicit OnDevice(int device) : status(cudaGetDevice(&before_)) {
        if (status == cudaSuccess && before_ != device) {
            status = cudaSetDevice(device);
            changed_ = status == cudaSuccess;
        }
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;

   public:
    cudaError_t status;
};

}  // namespace ospo
