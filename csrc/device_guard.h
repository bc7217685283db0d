// The current CUDA device during a launch.
#pragma once

namespace ospo {

// Make `device` current until the end of the scope. If `status` is an error, the device was not changed and nothing may
// be launched.
class DeviceGuard {
   public:
    explicit DeviceGuard(int device) : status(cudaGetDevice(&previous_)) {
        if (status == cudaSuccess && previous_ != device) {
            status = cudaSetDevice(device);
            changed_ = status == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int previous_ = 0;
    bool changed_ = false;

   public:
    cudaError_t status;
};

}  // namespace ospo
